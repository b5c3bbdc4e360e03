# Does alternating beat either objective alone at equal epochs? The reduced study, for a CPU: a
# BabyLlama of 3.4 million parameters, 24 epochs of a 50th of the text (200 thousand of 10 million
# words), a tenth of BLiMP, three seeds. What came of it: docs/results.md.
text = "babylm_10M"
dev = "babylm_dev"
slice = 50  # of every 50 blocks of 100 lines of each file the first, so each source keeps its share
vocab_size = 4096  # small, so that the body and not the embedding has most of the parameters

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
    lr=2e-3,
    keep=1,
    eval_every=200,
    compile="on",
)
arms = {
    "clm": dict(schedule="24_CLM"),
    "mlm": dict(schedule="24_MLM"),
    "antlm": dict(schedule="4_CLM+16_MLM+4_CLM"),
    "biphasic": dict(schedule="12_CLM+12_MLM"),  # arXiv 2507.00994
    "mixed": dict(schedule="24_CLM:MLM"),
    "mntp": dict(schedule="24_1CLM:15MNTP", modes=("causal", "mntp")),  # GPT-BERT's mix
    "causal_then_mixed": dict(schedule="12_CLM+12_CLM:MLM"),  # our own
}
baseline = "clm"  # --table --baseline=mlm shows the differences from the other one
seeds = 3

tasks = ("evaluation_data/blimp_filtered",)
limit = 90  # of about 890 pairs of each file
modes = ("causal", "masked")
