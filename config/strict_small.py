# An entry to BabyLM 2026, track strict-small (10M words): the recipe that the evidence so far
# supports best, and where each line is from. "study" is "Recipes of 2026" in docs/results.md: a
# small model, differences with 95% intervals over three seeds. Hours: 10 epochs are 161M tokens, 3
# minutes of steps on an H100 (874,000 tokens/s measured), 22 hours on two cores with AVX512_BF16
# (about 2,000 tokens/s), 120 hours on two with AVX2 (370). Then
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

# Both objectives in every step, 1:1, as the 2026 entry with the highest NLP part has them. Study:
# dev CLM 0.035 below AntLM's schedule (0.013 to 0.056), on a second slice 0.033 (-0.018 to 0.085);
# three causal parts to one are 0.090 worse, masked diffusion in place of MNTP no better.
schedule = "10_CLM:MNTP"
babylm_rules = True  # 10 epochs at most, checkpoints kept at 1M ... 100M words
mask_start = 0.3  # GPT-BERT: 0.30 falling to 0.15. Study: no clear difference
mask_end = 0.15
average_share = 0.2  # as that entry. Study: CLM 0.014 lower in each seed, and nothing worse

# Rows and optimizer of config/babyllama.py. Study: with Muon CLM was 0.176 higher (0.148 to 0.203).
block_size = 128
batch_rows = 256
micro_rows = 256
save_every = 2000
optimizer = "adamw"
lr = 7e-4
warmup = 0.025
