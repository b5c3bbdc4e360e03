# What do the best entries of 2026 train with, and does it help? On the slice, the sizes and the
# epochs of antlm_micro.py. Two arms average their weights: their last weights are the arms without
# it, so that clm_mntp is the baseline, and antlm the schedule of the paper. Said before the runs:
# a finding is a difference from clm_mntp whose 95% interval over three seeds leaves out 0 and which
# is at least 0.02 nats of a dev loss, or 1.0 points of BLiMP over the paradigms that clm_mntp has
# above 60 on seed 9. All 67 are given, too, and claim nothing.
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
    lr=2e-3,
    keep=1,
    eval_every=200,
    schedule="24_CLM:MNTP",
)
arms = {
    "clm_mntp": dict(average_share=0.2),
    "muon": dict(optimizer="muon"),  # lr tuned on seed 9, as that of AdamW was
    "falling_rate": dict(mask_start=0.3, mask_end=0.15),  # GPT-BERT's
    "diffusion": dict(schedule="24_CLM:MDNTP"),
    "three_to_one": dict(schedule="24_3CLM:1MNTP"),
    "antlm": dict(schedule="4_CLM+16_MLM+4_CLM", average_share=0.2, modes=("causal", "masked")),
    "biphasic": dict(schedule="12_CLM+12_MLM", modes=("causal", "masked")),
}
baseline = "clm_mntp"
seeds = 3

tasks = ("evaluation_data/blimp_filtered",)
limit = 90
modes = ("causal", "mntp")
