# The hybrid of GPT-BERT (Charpentier and Samuel 2024): every step has 1 row of causal to 15 of
# masked next-token prediction, and the share of hidden tokens falls from 0.30 to 0.15. The network
# is LTG-BERT small, the optimizer that of ltg_bert_small.py.
corpus = "corpora/babylm_16384"
corpus_command = "python prepare.py babylm_10M --dev babylm_dev --vocab_size 16384 --out " + corpus
out_dir = "runs/gpt_bert"

backbone = "ltg_bert"
n_layer = 12
n_head = 6
n_embd = 384
n_ff = 1024
dropout = 0.1

schedule = "24_1CLM:15MNTP"
block_size = 128
batch_rows = 1024
micro_rows = 256
mask_start = 0.3
mask_end = 0.15

optimizer = "lamb"
lr = 1e-2
warmup = 0.016
eps = 1e-6
clip = 2.0
