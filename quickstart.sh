#!/usr/bin/env bash
# From nothing to a scored model: text of a small grammar, tokenizer, training, scores, samples.
set -euo pipefail
cd "$(dirname "$0")"
text=corpora/grammar_text
python tools/grammar.py $text
python prepare.py $text/train.txt --dev $text/dev.txt --out corpora/grammar --vocab_size 1024
python train.py config/quickstart.py
python eval.py runs/quickstart --task $text/pairs
