# The quick start: 0.66 million parameters learn a small English grammar on two CPU cores.
corpus = "corpora/grammar"
corpus_command = "bash quickstart.sh"
out_dir = "runs/quickstart"

n_layer = 3
n_head = 4
n_embd = 128
n_ff = 256
# With one matrix for input and output, twice as many steps pass before "himself" and "herself",
# which then are pulled together as words and as predictions, are told apart.
tied = False

# AntLM's shape, then both objectives at once, so that each keeps what the other would forget.
# Causal scores are good early on, so three of four rows are masked.
schedule = "1_CLM+2_MLM+1_CLM+4_1CLM:3MLM"
block_size = 32
batch_rows = 16  # agreement of gender is learnt late: it takes many steps rather than many tokens
mask_start = 0.3  # as GPT-BERT: more to learn from at first,
mask_end = 0.15  # more to see at the end
lr = 2e-3
log_every = 100
eval_rows = 128
