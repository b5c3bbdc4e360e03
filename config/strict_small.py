# An entry to BabyLM 2026, track strict-small (10M words): the recipe that the evidence so far
# supports best, and where each line is from; "study" is "Does alternating help?" in
# docs/results.md. Hours: 10 epochs are some 135M tokens, 4 minutes of steps on an H100 (614,000
# tokens/s measured), 19 hours on two cores with AVX512_BF16 (about 2,000 tokens/s), 100 hours on
# two with AVX2 (370). Then
# python -m babylm.submit runs/strict_small --mode mntp --data evaluation_data --out submission
corpus = "corpora/babylm_16000"
corpus_command = "python prepare.py babylm_10M --dev babylm_dev --vocab_size 16000 --out " + corpus
out_dir = "runs/strict_small"

# BabyLlama 58M as AntLM has it (arXiv 2412.03275): sizes of BabyLlama (Timiryasov and Tastet 2023)
backbone = "babyllama"
n_layer = 16
n_head = 8
n_embd = 512
n_ff = 1024
tied = False

# Both objectives in every step: the best hybrids of 2026 do so, that with the highest NLP part in
# the ratio 1:1, and in the study no schedule of alternating phases beat a causal start followed by
# both. MNTP, since it shares the position that is read with CLM (GPT-BERT).
schedule = "10_CLM:MNTP"
babylm_rules = True  # 10 epochs at most, checkpoints kept at 1M ... 100M words
mask_start = 0.3  # GPT-BERT: 0.30 falling to 0.15
mask_end = 0.15

# rows and optimizer of config/babyllama.py
block_size = 128
batch_rows = 256
micro_rows = 256
save_every = 2000
optimizer = "adamw"
lr = 7e-4
warmup = 0.025
