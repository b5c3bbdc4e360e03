# The quick start: causal, masked, causal and both at once on a small English grammar.
corpus = "corpora/grammar"
corpus_command = "bash quickstart.sh"
out_dir = "runs/quickstart"

n_layer = 4
n_head = 4
n_embd = 128
n_ff = 256
tied = True

# AntLM's shape, a quarter of its length. The last phase brings back what so short a causal phase
# makes a small model forget.
schedule = "1_CLM+4_MLM+1_CLM+2_CLM:MLM"
block_size = 64
batch_rows = 32
lr = 3e-3
