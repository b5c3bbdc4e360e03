# The learning rates of antlm_micro.py: each objective alone, a quarter of the epochs, a seed that
# the study does not use.
text = "babylm_10M"
dev = "babylm_dev"
slice = 50
vocab_size = 4096

settings = dict(
    backbone="babyllama",
    n_layer=6,
    n_head=3,
    n_embd=192,
    n_ff=512,
    tied=True,
    block_size=128,
    batch_rows=32,
    micro_rows=32,
    keep=1,
    eval_every=200,
    compile="on",
)
arms = {
    "CLM_1e-3": dict(schedule="6_CLM", lr=1e-3),
    "CLM_2e-3": dict(schedule="6_CLM", lr=2e-3),
    "CLM_4e-3": dict(schedule="6_CLM", lr=4e-3),
    "MLM_1e-3": dict(schedule="6_MLM", lr=1e-3),
    "MLM_2e-3": dict(schedule="6_MLM", lr=2e-3),
    "MLM_4e-3": dict(schedule="6_MLM", lr=4e-3),
}
seeds = 1
first_seed = 9

tasks = ()
