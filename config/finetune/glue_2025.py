# The seven tasks of the 2025 challenge, with the settings of its eval_finetuning.sh.
data = "evaluation_data/full_eval/glue_filtered"
tasks = ("boolq", "mnli", "mrpc", "multirc", "qqp", "rte", "wsc")
max_length = 512
lr = 3e-5
lr_decay = "cosine"
warmup = 0.06
weight_decay = 0.01
clip = 0.0
batch_rows = 32
patience = 0  # all epochs are run
select = "metric"
seeds = ("42",)
task_settings = {
    "boolq": dict(batch_rows=16),
    "multirc": dict(batch_rows=16),
    "wsc": dict(epochs=30),
}
