# The learning rates of antlm_micro.py: each objective alone, a quarter of the epochs, a seed that the study does not use.
text = "babylm_10M"
dev = "babylm_dev"
slice = 50
vocab_size = 4096

settings = dict(
    backbone="babyllama", n_layer=6, n_head=3, n_embd=192, n_ff=512, tied=True,
    block_size=128, batch_rows=32, micro_rows=32, keep=1, eval_every=200, compile="on",
)
arms = {f"{objective}_{lr}": dict(schedule=f"6_{objective}", lr=lr) for objective in ("CLM", "MLM") for lr in (1e-3, 2e-3, 4e-3)}
seeds = 1
first_seed = 9

tasks = ()
