# Low-rank adapters as in the 2024 challenge, with the settings of its train_lora.py. There they sit
# where PEFT puts them by default, here on every matrix of the blocks.
lora_rank = 8
lora_alpha = 16
lora_dropout = 0.1
lr = 3e-4
warmup = 0.06
epochs = 32
patience = 0  # all epochs are run
select = "loss"
seeds = ("42",)
