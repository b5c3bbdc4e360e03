# The published comparison for BabyLlama (arXiv 2412.03275): 58M parameters, 10M words, 24 epochs,
# for a GPU.
text = "babylm_10M"
dev = "babylm_dev"
corpus = "corpora/babylm_16000"
vocab_size = 16000

config = "config/babyllama.py"
arms = {
    "clm": dict(schedule="24_CLM"),
    "mlm": dict(schedule="24_MLM"),
    "antlm": dict(schedule="4_CLM+16_MLM+4_CLM"),
}
baseline = "clm"
seeds = 3

tasks = ("evaluation_data/blimp_filtered",)
modes = ("causal", "masked")
glue = ("rte", "mrpc", "cola", "sst2", "wsc")
glue_data = "evaluation_data/glue_filtered"
