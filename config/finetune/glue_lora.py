# Settings of finetune.py: low-rank adapters as in the 2024 challenge (train_lora.py of its evaluation pipeline). There
# the adapters sit where PEFT puts them by default, here on every matrix of the blocks.
lora_rank = 8
lora_alpha = 16
lora_dropout = 0.1
lr = 3e-4
warmup = 0.06
epochs = 32
patience = 0
select = "loss"
seeds = ("42",)
