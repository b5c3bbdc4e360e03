# An entry to BabyLM 2026, track strict (100M words): the recipe of strict_small.py, which says
# where each line is from, on ten times the text. Hours: some 1.6 billion tokens, half an hour of
# steps on an H100, nine days on two cores with AVX512_BF16. Then
# python -m babylm.submit runs/strict --mode mntp --data evaluation_data --out submission
corpus = "corpora/babylm_100M"
corpus_command = "python prepare.py babylm_100M --dev babylm_dev --vocab_size 16000 --out " + corpus
out_dir = "runs/strict"

backbone = "babyllama"
n_layer = 16
n_head = 8
n_embd = 512
n_ff = 1024
tied = False

schedule = "10_CLM:MNTP"
babylm_rules = True  # 10 epochs at most, checkpoints kept at 1M ... 100M, 200M ... 1000M words
mask_start = 0.3
mask_end = 0.15
average_share = 0.2

block_size = 128
batch_rows = 256
micro_rows = 256
save_every = 5000
optimizer = "adamw"
lr = 7e-4
warmup = 0.01
