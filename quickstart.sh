#!/usr/bin/env bash
# From nothing to a scored model on two CPU cores: text, tokenizer, training, scores, samples, picture.
#
#     pip install -r requirements.txt && bash quickstart.sh
#
# A second call goes on where the first one stopped. To start anew, remove runs/quickstart.
set -euo pipefail
cd "$(dirname "$0")"

# 1. text from a small grammar, and minimal pairs to test with; your own text goes in its place
text=corpora/grammar_text
if [ ! -d $text ]; then
    python tools/grammar.py $text
fi

# 2. text to tokenizer and token files
if [ ! -d corpora/grammar ]; then
    python prepare.py $text/train.txt --dev $text/dev.txt --out corpora/grammar --vocab_size 661
fi

# 3. train: a causal, a masked, a causal and a mixed phase
python train.py config/quickstart.py --resume

# 4. percent of minimal pairs that the model gets right: left to right (causal), and with one
#    token hidden at a time (masked)
python eval.py runs/quickstart --task $text/pairs

# 5. sentences of its own
python sample.py runs/quickstart --n 5

# 6. a picture of the losses
if python -c "import matplotlib" 2> /dev/null; then
    python tools/plot.py runs/quickstart
else
    echo "pip install matplotlib, then python tools/plot.py runs/quickstart draws the losses"
fi
