# AntLM on LTG-BERT base: sizes and optimizer from LTG-BERT (Samuel et al. 2023; ltgoslo/ltg-bert,
# babylm/), schedule of AntLM (arXiv 2412.03275) as it is remembered: check it against the paper.
corpus = "corpora/babylm_16384"
corpus_command = "python prepare.py babylm_10M --dev babylm_dev --vocab_size 16384 --out " + corpus
out_dir = "runs/ltg_bert"

backbone = "ltg_bert"
n_layer = 12
n_head = 12
n_embd = 768
n_ff = 2048
dropout = 0.1

schedule = "6_CLM+60_MLM+6_CLM"
block_size = 128
batch_rows = 1024  # the reference has 1024 rows per GPU
micro_rows = 256
mask_span = 3.0

optimizer = "lamb"
lr = 1e-2
warmup = 0.016
eps = 1e-6
clip = 2.0
