"""Result files of eval.py and finetune.py."""

import json
from pathlib import Path

from antlm.files import write_whole
from config import UserError


def read_result(path: Path) -> dict:
    """Content of a result file of eval.py or finetune.py; raises UserError."""
    try:
        whole = json.loads(path.read_bytes())
        whole["tasks"].items(), whole["step"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path}: not a result file of ours ({type(e).__name__}: {e}); remove it") from None
    return whole


def write_result(path: Path, whole: dict):
    """Write a result file, one line for each of its keys; it appears whole or not at all."""
    lines = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in whole.items())
    write_whole(path, lambda f: f.write(("{\n" + ",\n".join(lines) + "\n}\n").encode()))
