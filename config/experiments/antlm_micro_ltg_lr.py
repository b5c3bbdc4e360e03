# The learning rates of antlm_micro_ltg.py, as antlm_micro_lr.py finds those of antlm_micro.py.
text = "babylm_10M"
dev = "babylm_dev"
slice = 50
vocab_size = 4096

config = "config/ltg_bert_small.py"
settings = dict(
    n_layer=6,
    n_head=3,
    n_embd=192,
    n_ff=512,
    batch_rows=32,
    micro_rows=32,
    keep=1,
    eval_every=200,
    compile="on",
)
arms = {
    "CLM_2.5e-3": dict(schedule="6_CLM", lr=2.5e-3),
    "CLM_5e-3": dict(schedule="6_CLM", lr=5e-3),
    "CLM_1e-2": dict(schedule="6_CLM", lr=1e-2),
    "CLM_2e-2": dict(schedule="6_CLM", lr=2e-2),
    "MLM_2.5e-3": dict(schedule="6_MLM", lr=2.5e-3),
    "MLM_5e-3": dict(schedule="6_MLM", lr=5e-3),
    "MLM_1e-2": dict(schedule="6_MLM", lr=1e-2),
    "MLM_2e-2": dict(schedule="6_MLM", lr=2e-2),
}
seeds = 1
first_seed = 9

tasks = ()
