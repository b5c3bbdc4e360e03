"""Checkpoints and run folders."""

import fcntl
import hashlib
import json
import math
import os
import pickle
import re
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from antlm.distributed import Processes
from antlm.files import write_whole
from antlm.tokenizer import BOUNDARIES, Tokenizer
from config import UserError
from model import ModelConfig, Transformer
from schedule import parse


def digest(content, most: float = math.inf) -> str:
    """SHA-256 over plain data and the bytes of every tensor in it, so that one flipped bit shows.

    Raises ValueError beyond `most` values and bytes: lists in lists and views can claim any number of them.
    """
    h, left = hashlib.sha256(), most

    def walk(x):
        nonlocal left
        left -= 1 + (x.numel() * x.element_size() if isinstance(x, Tensor) else 0)
        if left < 0:
            raise ValueError("claims more than the file holds")
        h.update(type(x).__name__.replace("OrderedDict", "dict").encode())
        if isinstance(x, Tensor):
            h.update(f"{x.dtype}{tuple(x.shape)}{'grad' * x.requires_grad}".encode())
            h.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(x, dict):
            for key, value in x.items():
                h.update(repr(key).encode())
                walk(value)
        elif isinstance(x, (list, tuple)):
            for value in x:
                walk(value)
        else:
            h.update(repr(x).encode())
        h.update(b";")

    walk(content)
    return h.hexdigest()


def save_checkpoint(path: Path, model: Transformer, **content):
    """Write the model and plain content to one file that is either whole or not there; raises OSError."""
    content |= {"config": asdict(model.config), "model": dict(model.state_dict())}
    content["sha256"] = digest(content)
    write_whole(path, lambda f: torch.save(content, f))


def load_checkpoint(path: Path, device: str = "cpu") -> dict:
    """Content of a checkpoint as plain data, its checksum verified; raises UserError. No code in it is run."""
    try:
        size = os.path.getsize(path)
        with zipfile.ZipFile(path) as z:  # torch.load would unpack a record of a thousand times its size
            if sum(record.file_size for record in z.infolist()) > size:
                raise ValueError("claims more than the file holds")
        content = torch.load(path, map_location=device, weights_only=True)
        whole = isinstance(content, dict) and content.pop("sha256", None) == digest(content, most=2 * size)  # tied: twice
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path}: damaged, or holds code or objects where plain data was expected; not loaded") from None
    except Exception as e:  # torch.load raises whatever a damaged file makes it run into
        first = str(e).strip().splitlines()[0][:150] if str(e).strip() else type(e).__name__
        raise UserError(f"{path}: damaged, or not a checkpoint of train.py ({first})") from None
    if not whole:
        raise UserError(f"{path}: damaged, its checksum does not match; use the checkpoint before it")
    return content


def checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run folder, newest first."""
    return sorted((f for f in Path(run).glob("step_*.pt") if f.stem[5:].isdecimal()), key=lambda f: -int(f.stem[5:]))


def load_newest(run: Path, say=print) -> tuple[Path | None, dict | None]:
    """Path and content of the newest whole checkpoint; no content without a whole one, no path without any."""
    path = None
    for path in checkpoints(run):
        try:
            return path, load_checkpoint(path)
        except UserError as e:
            say(f"skipped {e}")
    return path, None


def load_model(content: dict, device: str = "cpu", name: str | Path = "checkpoint") -> Transformer:
    """The model of a loaded checkpoint, in eval mode; raises UserError, which starts with name.

    What the settings claim is compared with the weights at hand before any of it is built.
    """
    try:
        config, weights = content["config"], content["model"]
        c, n = ModelConfig(**config), sum(w.numel() for w in weights.values())
        if c.n_embd * max(c.vocab_size, c.n_embd, c.n_ff) > n:
            raise ValueError(f"claims larger matrices than its {n:,} weights")
        one = Transformer(ModelConfig(**config | {"n_layer": 1}))
        expected, block = dict(one.state_dict()), dict(one.blocks[0].state_dict())
        if len(weights) != len(expected) + (c.n_layer - 1) * len(block):
            raise ValueError(f"{len(weights)} weights are not those of {c.n_layer} layers")
        expected |= {f"blocks.{i}.{key}": p for i in range(1, c.n_layer) for key, p in block.items()}
        for key, p in expected.items():
            if weights[key].shape != p.shape or not weights[key].is_floating_point():
                raise ValueError(f"{key} must hold floating-point numbers of shape {tuple(p.shape)}")
        model = Transformer(c)
        model.load_state_dict(weights)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:150]
        raise UserError(f"{name}: not a checkpoint of this model.py ({type(e).__name__}: {reason})") from None
    return model.to(device).eval()


# Settings that may differ when a run goes on; all others would make it a different run.
FREE = {"corpus", "out_dir", "resume", "prepare", "score", "micro_rows", "skip_nonfinite", "log_every", "eval_every",
        "eval_rows", "save_every", "keep", "babylm_rules", "device", "precision", "compile"}


def open_run(run: Path, s, corpus, p: Processes):
    """Lock the run folder, write down what this run is -> lock's file; path and content of the newest whole checkpoint."""
    (run / "source" / "config").mkdir(parents=True, exist_ok=True)
    (run / "source" / "antlm").mkdir(exist_ok=True)
    lock, found = open(run / "lock", "ab+", buffering=0), checkpoints(run)
    if p.rank == 0:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it when this process dies
        except BlockingIOError:
            raise UserError(f"{run}: another train.py is at work in it; wait for its end or choose another --out_dir") from None
        except OSError as e:
            p.say(f"{run}: its file system has no locks ({e.strerror}); do not start a second run in it")
        launch = f"{os.uname().nodename} {os.getppid()} {os.environ.get('TORCHELASTIC_RUN_ID')}".encode()
        if "TORCHELASTIC_RUN_ID" in os.environ and (run / "lock").read_bytes() == launch:  # by the same torchrun
            s.resume = True
            p.say(f"{run}: started again by torchrun, so --resume")
        if found and not s.resume:
            raise UserError(f"{run}: holds a run already ({found[0].name}); go on with --resume or choose another --out_dir")
        lock.truncate(0)
        lock.write(launch)
        for part in (*run.glob(".*.part"), *run.glob("source/**/.*.part")):  # what a kill cut short
            part.unlink()
    path, content = load_newest(run, p.say)
    if content:
        theirs, ours = asdict(type(s)()) | content["settings"], asdict(s)  # an older run lacks newer settings
        for name in sorted(ours.keys() - FREE):
            if theirs[name] != ours[name]:
                raise UserError(f"{path}: was trained with {name}={theirs[name]!r}, not {ours[name]!r}; "
                                 "a changed setting needs a new --out_dir")
        if (content["tokenizer_sha256"], content["tokens_sha256"]) != (corpus.tokenizer.sha256, corpus.meta["train"]["sha256"]):
            raise UserError(f"{path}: was trained on another corpus or tokenizer than {corpus.folder}")
    elif path:
        raise UserError(f"{run}: none of its {len(found)} checkpoints is whole; choose another --out_dir")
    if p.rank == 0:
        here, step, metrics = Path(__file__).parent.parent, content["step"] if content else 0, run / "metrics.jsonl"
        lines = re.finditer(rb'^{"step": (\d+),.*}\n', metrics.read_bytes() if metrics.exists() else b"", re.M)
        write_whole(metrics, lambda f: f.writelines(line[0] for line in lines if int(line[1]) <= step))
        write_whole(run / "settings.json", lambda f: f.write(json.dumps(asdict(s), indent=1).encode()))
        write_whole(run / "tokenizer.json", lambda f: f.write((corpus.folder / "tokenizer.json").read_bytes()))
        for file in (*here.glob("*.py"), *here.glob("config/*.py"), *here.glob("antlm/*.py")):  # a result carries the code that made it
            write_whole(run / "source" / file.relative_to(here), lambda f: f.write(file.read_bytes()))
    return lock, path, content


def load_run(path: str, device: str):
    """Path, content, model and tokenizer of a checkpoint, or of the newest whole one in a run folder."""
    if Path(path).is_dir():
        file, content = load_newest(Path(path), lambda *text: print(*text, file=sys.stderr))
        if not content:
            raise UserError(f"{path}: holds no whole checkpoint (step_*.pt); train.py writes them")
    else:
        file, content = Path(path), load_checkpoint(Path(path))
    tokenizer = Tokenizer(file.parent / "tokenizer.json")
    try:
        if tokenizer.sha256 != content["tokenizer_sha256"] or tokenizer.vocab_size > content["config"]["vocab_size"]:
            raise UserError(f"{file.parent}/tokenizer.json: not the one that {file.name} was trained with (sha256)")
        parse(content["settings"]["schedule"])
        numbers = content["step"], content["settings"]["block_size"]
        if any(type(n) is not int or n < 1 for n in numbers) or content["boundary"] not in BOUNDARIES:
            raise ValueError("step, block_size or boundary")
        return file, content, load_model(content, device, file), tokenizer
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as e:
        raise UserError(f"{file}: not a checkpoint of this train.py ({type(e).__name__}: {e})") from None
