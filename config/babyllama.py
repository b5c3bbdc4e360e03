# AntLM on BabyLlama 58M: schedule from the paper (arXiv 2412.03275), sizes from BabyLlama
# (Timiryasov and Tastet 2023), optimizer from the 97M model of its code (timinar/BabyLlama: lr 7e-4
# and 300 warm-up steps of 2 x 128 rows).
corpus = "corpora/babylm_16000"
corpus_command = "python prepare.py babylm_10M --dev babylm_dev --vocab_size 16000 --out " + corpus
out_dir = "runs/babyllama"

backbone = "babyllama"
n_layer = 16
n_head = 8
n_embd = 512
n_ff = 1024
tied = False

schedule = "4_CLM+16_MLM+4_CLM"
block_size = 128
batch_rows = 256
micro_rows = 256
save_every = 2000  # a save takes as long as 40 steps on an H100

optimizer = "adamw"
lr = 7e-4
warmup = 0.025  # 300 of about 11,800 steps
