"""Text -> tokenizer -> token files. No torch.

    python prepare.py TEXT... --dev TEXT... --out corpora/babylm --vocab_size 16384

TEXT is a file or a folder of .train, .dev or .txt files in UTF-8. The folder --out then holds tokenizer.json,
train.bin, dev.bin (token ids, no header) and meta.json, which says what is in them.
"""

import argparse
import hashlib
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken

from antlm.files import Progress, write_json
from antlm.tokenizer import (
    BOUNDARIES,
    PATTERN,
    SPECIAL,
    START,
    Tokenizer,
    save_tokenizer,
    train_bpe,
)
from config import UserError

TEXT = (".train", ".dev", ".txt")
BLOCK = 1 << 22  # bytes of text held at a time


def text_files(paths: list[str]) -> list[Path]:
    """Files named, and those in folders named that end in .train, .dev or .txt, sorted; raises UserError."""
    files = []
    for path in map(Path, paths):
        found = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in TEXT and f.is_file())
        if not found:
            what = "holds no .train, .dev or .txt file" if path.is_dir() else "does not exist"
            raise UserError(f"{path}: {what}; name text files or folders of them")
        files += found
    return files


def read_blocks(path: Path):
    """Yield the text in blocks of whole lines, each ended by a newline; raises UserError at invalid UTF-8.

    What Windows adds goes: a byte-order mark in front, and the \\r of \\r\\n.
    """
    offset = 0
    with open(path, "rb") as f:
        while block := b"".join(f.readlines(BLOCK)):
            try:
                text = block.decode().removeprefix("" if offset else "\ufeff").replace("\r\n", "\n")
            except UnicodeDecodeError as e:
                raise UserError(f"{path}: byte {offset + e.start} is not valid UTF-8 (0x{block[e.start]:02x}); "
                                "convert the file, e.g. with iconv -t utf-8") from None
            yield text if text.endswith("\n") else text + "\n"
            offset += len(block)


def count_pieces(files: list[Path]) -> Counter:
    """How often the pattern finds each piece of text in the files."""
    counts, find = Counter(), regex.compile(PATTERN).findall
    progress, done = Progress("counting words", sum(f.stat().st_size for f in files)), 0
    for path in files:
        for block in read_blocks(path):
            counts.update(find(block))
            progress(done := done + len(block))
    return counts


def place_starts(ids: np.ndarray, boundary: str, newline: int, heading: list[int], fresh: bool):
    """Put start tokens into the ids of whole lines; blank lines go.

    A document opens at the start of a file, after a blank line and at a line that starts with `heading` ("= = =").
    fresh: does the first line open one? -> ids, number of documents that opened, does the next block open one?
    """
    opens_line = np.append(True, ids[:-1] == newline)
    blank = opens_line & (ids == newline)
    first = opens_line & ~blank
    after_blank = np.append(fresh, blank[:-1])
    is_heading = first.copy()
    for i, token in enumerate(heading):
        is_heading &= np.append(ids[i:], np.full(min(i, len(ids)), -1)) == token
    document = first & (after_blank | is_heading)
    keep = ids != newline if boundary == "line" else ~blank
    at = {"line": first, "document": document, "none": np.zeros_like(first)}[boundary]
    copies = keep.astype(np.int64) + at  # a token that a start precedes stands twice, the first of the two becomes it
    out = np.repeat(ids, copies)
    out[(np.cumsum(copies) - copies)[at]] = START
    return out, int(document.sum()), bool(blank[-1])


def encode_files(files: list[Path], out: Path, tokenizer: Tokenizer, boundary: str) -> dict:
    """Encode text files into one token file -> what meta.json says of it. Memory grows with the longest line only."""
    newline, heading = tokenizer.encode("\n")[0], tokenizer.encode("= = =")
    stats = dict(file=out.name, dtype=tokenizer.dtype.name, tokens=0, words=0, bytes=0, documents=0, max_id=0)
    digest = hashlib.sha256()
    progress, total = Progress("encoding", sum(f.stat().st_size for f in files)), 0
    with open(out, "wb") as f:
        for path in files:
            fresh = True
            for block in read_blocks(path):
                ids = tokenizer.bpe.encode_to_numpy(block, disallowed_special=())
                ids, documents, fresh = place_starts(ids, boundary, newline, heading, fresh)
                raw = ids.astype(tokenizer.dtype).tobytes()
                f.write(raw)
                digest.update(raw)
                stats["tokens"] += len(ids)
                stats["words"] += len(block.split())
                stats["documents"] += documents
                stats["max_id"] = max(stats["max_id"], int(ids.max(initial=0)))
                progress(total := total + len(block))
            stats["bytes"] += path.stat().st_size
    if not stats["words"]:
        raise UserError(f"{files[0]}: the {len(files)} input file(s) hold no words")
    return stats | {"sha256": digest.hexdigest()}


def prepare(train: list[str], dev: list[str], out: str, vocab_size: int = 16384, boundary: str = "line",
            tokenizer: str | None = None) -> dict:
    """Text to a corpus folder -> meta. The folder appears whole or not at all; raises UserError.

    tokenizer: an existing tokenizer.json to encode with instead of training one (arms of an experiment share theirs).
    """
    folder, train_files, dev_files = Path(out), text_files(train), text_files(dev)
    if folder.exists():
        raise UserError(f"{folder}: exists already; remove it or choose another --out")
    if boundary not in BOUNDARIES:
        raise UserError(f"--boundary must be one of {', '.join(BOUNDARIES)}, not {boundary!r}")
    smallest = len(SPECIAL) + 256
    if (n_merges := vocab_size - smallest) < 0:
        raise UserError(f"--vocab_size {vocab_size}: must be at least {smallest}, for bytes and special tokens")
    part = next(parent for parent in folder.parents if parent.exists()) / f".{folder.name}.{os.getpid()}"
    part.mkdir()
    try:
        if tokenizer:
            tok = Tokenizer(tokenizer)  # of the user's file, so that an error names it and not the copy
            shutil.copy(tokenizer, part / "tokenizer.json")
        else:
            counts = count_pieces(train_files)
            if all(piece.isspace() for piece in counts):
                raise UserError(f"{train_files[0]}: the {len(train_files)} input file(s) hold no words")
            merges = train_bpe(counts, n_merges)
            if len(merges) < n_merges:
                print(f"the text has pairs for {len(merges)} merges: {len(merges) + smallest} tokens, not {vocab_size}")
            save_tokenizer(part / "tokenizer.json", merges)
            tok = Tokenizer(part / "tokenizer.json")
        meta = {"format": 1, "boundary": boundary, "vocab_size": tok.vocab_size, "special": SPECIAL,
                "tokenizer_sha256": tok.sha256,
                "train": encode_files(train_files, part / "train.bin", tok, boundary),
                "dev": encode_files(dev_files, part / "dev.bin", tok, boundary),
                "settings": dict(train=train, dev=dev, vocab_size=vocab_size, tokenizer=tokenizer)}
        write_json(part / "meta.json", meta)
        folder.parent.mkdir(parents=True, exist_ok=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return meta


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", nargs="+", metavar="TEXT", help="training text: files, folders of .train, .dev, .txt")
    parser.add_argument("--dev", nargs="+", required=True, metavar="TEXT", help="development text, likewise")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--vocab_size", type=int, default=16384, help="tokens, 4 special ones and 256 bytes among them")
    parser.add_argument("--boundary", default="line", choices=BOUNDARIES, help="what a start token stands in front of")
    parser.add_argument("--tokenizer", help="encode with this tokenizer.json instead of training one")
    parser.error = lambda message: sys.exit(f"prepare.py: {message}")
    args, began = parser.parse_args(), time.time()
    try:
        meta = prepare(**vars(args))
    except (UserError, OSError) as e:
        sys.exit(f"prepare.py: {e}")
    sys.stdout.reconfigure(errors="backslashreplace")  # for a path that is not UTF-8
    for s in (meta["train"], meta["dev"]):
        print(f"{args.out}/{s['file']}: {s['words']:,} words, {s['tokens']:,} tokens, {s['documents']:,} documents")
    print(f"{args.out}: vocabulary of {meta['vocab_size']:,}, boundary {args.boundary}; {time.time() - began:.0f} s")
