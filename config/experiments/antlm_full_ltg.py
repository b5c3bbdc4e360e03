# AntLM's comparison for LTG-BERT (arXiv 2412.03275), with the small model: 27.7M parameters where
# the paper has base (98M); 10M words, 72 epochs, for a GPU. The schedule has not been checked
# against the paper.
text = "babylm_10M"
dev = "babylm_dev"
corpus = "corpora/babylm_16384"
vocab_size = 16384

config = "config/ltg_bert_small.py"
arms = {"mlm": dict(schedule="72_MLM"), "antlm": dict(schedule="6_CLM+60_MLM+6_CLM")}
baseline = "mlm"
seeds = 3

tasks = ("evaluation_data/blimp_filtered",)
modes = ("causal", "masked")
glue = ("rte", "mrpc", "cola", "sst2", "wsc")
glue_data = "evaluation_data/glue_filtered"
