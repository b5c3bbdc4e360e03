# antlm_micro.py with an LTG-BERT: the same text, arms and scores; optimizer and masking of
# config/ltg_bert_small.py.
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
    lr=5e-3,
    keep=1,
    eval_every=200,
    compile="on",
)
arms = {
    "clm": dict(schedule="24_CLM"),
    "mlm": dict(schedule="24_MLM"),
    "antlm": dict(schedule="4_CLM+16_MLM+4_CLM"),
    "biphasic": dict(schedule="12_CLM+12_MLM"),
    "mixed": dict(schedule="24_CLM:MLM"),
    "mntp": dict(schedule="24_1CLM:15MNTP", modes=("causal", "mntp")),
    "causal_then_mixed": dict(schedule="12_CLM+12_CLM:MLM"),
}
baseline = "mlm"
seeds = 2

tasks = ("evaluation_data/blimp_filtered",)
limit = 90
modes = ("causal", "masked")
