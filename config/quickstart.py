# The quick start: causal, masked, causal on a small English grammar; under 3 minutes on 2 CPU cores.
corpus = "corpora/grammar"
out_dir = "runs/quickstart"
prepare = ("tools/grammar.py corpora/grammar_text",
           "data.py corpora/grammar_text/train.txt --dev corpora/grammar_text/dev.txt --out corpora/grammar --vocab_size 1024")
score = "corpora/grammar_text/pairs"

n_layer = 4
n_head = 4
n_embd = 128
n_ff = 256
tied = True

schedule = "1_CLM+4_MLM+1_CLM"  # AntLM's shape, a quarter of its length
block_size = 64
batch_rows = 64
lr = 3e-3
