# BabyLlama 97M: sizes, tied embedding, lr and batch from timinar/BabyLlama; schedule as AntLM
# (arXiv 2412.03275).
corpus = "corpora/babylm_16000"
corpus_command = "python prepare.py babylm_10M --dev babylm_dev --vocab_size 16000 --out " + corpus
out_dir = "runs/babyllama_97m"

backbone = "babyllama"
n_layer = 12
n_head = 12
n_embd = 768
n_ff = 2048
tied = True

schedule = "4_CLM+16_MLM+4_CLM"
block_size = 128
batch_rows = 256
micro_rows = 256
save_every = 2000  # a save takes as long as 30 steps on an H100

optimizer = "adamw"
lr = 7e-4
warmup = 0.025
