# The seven tasks of the 2026 challenge, with the settings of its eval_finetuning.sh (babylm-eval at
# 3d57ddc8): those of 2025, but the classifier reads the last token of the text.
data = "evaluation_data/full_eval/glue_filtered"
tasks = ("boolq", "mnli", "mrpc", "multirc", "qqp", "rte", "wsc")
pool = "last"
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
