# The learning rates of antlm_micro_ltg.py, as antlm_micro_lr.py finds those of antlm_micro.py.
text = "babylm_10M"
dev = "babylm_dev"
slice = 50
vocab_size = 4096

config = "config/ltg_bert_small.py"
settings = dict(
    n_layer=6, n_head=3, n_embd=192, n_ff=512, batch_rows=32, micro_rows=32, keep=1,
    eval_every=200, compile="on",
)
arms = {f"{objective}_{lr}": dict(schedule=f"6_{objective}", lr=lr)
        for objective in ("CLM", "MLM") for lr in (2.5e-3, 5e-3, 1e-2, 2e-2)}
seeds = 1
first_seed = 9

tasks = ()
