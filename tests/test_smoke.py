"""From a text to a trained model in five steps; a place to begin reading."""

import json

import torch

import config
import prepare
import train
from antlm.checkpoint import load_run
from sample import generate


def test_a_text_becomes_a_model_that_has_learnt_it(tmp_path):
    # 1. a text, a line for each sentence, and a part of it for evaluation
    lines = ["The cat sees the dog.", "The dog follows the bird.", "The bird hears the cat."]
    (tmp_path / "train.txt").write_text("\n".join(lines * 400))
    (tmp_path / "dev.txt").write_text("\n".join(lines))
    texts = [str(tmp_path / "train.txt")], [str(tmp_path / "dev.txt")]

    # 2. prepare.py makes tokens of it
    prepare.prepare(*texts, str(tmp_path / "corpus"), vocab_size=300)

    # 3. train.py learns them, predicting first hidden tokens and then the next one
    flags = [f"--corpus={tmp_path / 'corpus'}", f"--out_dir={tmp_path / 'run'}"]
    flags += ["--schedule=1_MLM+1_CLM", "--n_layer=1", "--n_embd=32", "--n_head=2", "--n_ff=64"]
    flags += ["--block_size=16", "--batch_rows=8", "--lr=1e-2", "--log_every=1"]
    train.train(config.load(train.Settings, flags))

    # 4. metrics.jsonl has the losses of every step
    metrics = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    losses = [entry["loss"] for entry in metrics if "loss" in entry]
    for objective in ("MLM", "CLM"):
        values = [loss[objective] for loss in losses if objective in loss]
        assert values[-1] < 0.5 * values[0]

    # 5. the model goes on with a text
    run = load_run(tmp_path / "run")
    prompt = torch.tensor([run.tokenizer.encode_text("The", run.boundary)])
    tokens = generate(run.model, prompt, 4, block_size=run.block_size, temperature=0)
    assert run.tokenizer.decode(tokens).split()[0] in ("cat", "dog", "bird")
