# The quick start: causal, masked, causal and both at once on a small English grammar. On 2 CPU cores it takes 1.5 minutes in
# bfloat16, 2.4 in float32.
corpus = "corpora/grammar"
out_dir = "runs/quickstart"
prepare = ("tools/grammar.py corpora/grammar_text",
           "prepare.py corpora/grammar_text/train.txt --dev corpora/grammar_text/dev.txt --out corpora/grammar --vocab_size 1024")
score = "corpora/grammar_text/pairs"

n_layer = 4
n_head = 4
n_embd = 128
n_ff = 256
tied = True

# AntLM's shape, a quarter of its length. The last phase brings back what so short a causal phase makes a small model forget.
schedule = "1_CLM+4_MLM+1_CLM+2_CLM:MLM"
block_size = 64
batch_rows = 32
lr = 3e-3
