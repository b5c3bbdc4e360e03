"""Text to tokenizer and token files. No torch.

    python prepare.py TEXT... --dev TEXT... --out corpora/babylm --vocab_size 16384

TEXT is a file or a folder of .train, .dev or .txt files in UTF-8, plain or as .gz. The folder --out
then holds tokenizer.json, train.bin and dev.bin (token ids, no header) and meta.json, which says
what is in them.
"""

import argparse
import hashlib
import os
import re
import shutil
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import regex

from antlm.files import Progress, new_folder, write_json
from antlm.program import clean_exit
from antlm.texts import find_files, open_text
from antlm.tokenizer import (
    BOUNDARIES,
    PATTERN,
    SPECIAL,
    START,
    Tokenizer,
    save_tokenizer,
    train_bpe,
)
from antlm.workers import start_workers
from config import UserError, require

TEXT_SUFFIXES = (".train", ".dev", ".txt")
GZIP_SUFFIXES = (".train.gz", ".dev.gz", ".txt.gz")
BLOCK_BYTES = 1 << 21  # of text held in memory at a time, in each process
# one process reads and puts together, and keeps no more than this busy
DEFAULT_PROCESSES = min(4, os.cpu_count() or 1)

find_pieces = regex.compile(PATTERN).findall
# a word with the spaces in front of it. Four control characters are spaces for `re` alone
WORD = re.compile(r"[\S\x1c-\x1f]+|[^\S\x1c-\x1f]+[\S\x1c-\x1f]*")


# ---------------------------------------------------------------------------------- reading text


def text_files(paths: list[str]) -> list[Path]:
    """Return the files named, which may end in anything, and the text files in the folders named.

    Raises UserError for a path that has none.
    """
    files = []
    for path in paths:
        files += find_files(Path(path), TEXT_SUFFIXES + GZIP_SUFFIXES)
    return files


def check_texts(files: list[Path]):
    """Raise UserError for a file that comes twice, in train or dev, and for one that is no text.

    Files that hold the same text may be meant, as short ones in a crawl; they are said on stderr.
    """
    first = {}  # the first file of each identity and of each content
    copies = []
    for file in files:
        status = file.stat()
        identity = (status.st_dev, status.st_ino)
        require(
            identity not in first,
            f"{file}: was named before, as {first.get(identity)}; "
            "name every text once, in train or in dev",
        )
        first[identity] = file

        with open_text(file) as text:
            content = hashlib.file_digest(text, "sha256").digest()
        if content in first and status.st_size > 0:
            copies.append(f"{file} that of {first[content]}")
        first.setdefault(content, file)
    if copies:
        message = f"{len(copies)} file(s) hold the text of another: first {copies[0]}"
        print(message, file=sys.stderr, flush=True)


def text_bytes(files: list[Path]) -> int:
    """Return how many bytes of text files hold, unpacked."""
    total = 0
    for path in files:
        with open_text(path) as text:
            total += text.seek(0, os.SEEK_END)
    return total


def read_blocks(path: Path):
    """Yield a text in blocks of whole lines, each ended by a newline.

    A byte-order mark at the start is dropped. Raises UserError at bytes that are not UTF-8.
    """
    offset = 0
    with open_text(path) as file:
        while block := file.read(BLOCK_BYTES) + file.readline():
            # UTF-8 has no newline inside a character, so whole lines are whole characters
            try:
                text = block.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}: byte {offset + error.start} is not valid UTF-8 "
                    f"(0x{block[error.start]:02x}); convert the file, e.g. with "
                    "iconv -f windows-1252 -t UTF-8"
                ) from None

            if offset == 0:
                text = text.removeprefix("\ufeff")
            # line ends of Windows, those of Windows written once more as text, those of old Macs
            for line_end in ("\r\r\n", "\r\n", "\r"):
                text = text.replace(line_end, "\n")
            if not text.endswith("\n"):
                text += "\n"
            yield text
            offset += len(block)


def read_files(files: list[Path]):
    """Yield the blocks of all files, one after the other, each with the number of its file."""
    for number, path in enumerate(files):
        for block in read_blocks(path):
            yield number, block


def count_pieces(files: list[Path], map_blocks=map) -> Counter:
    """Count the pieces of text (words, numbers, ...) that PATTERN finds in the files.

    map_blocks: a function as map, which may work in several processes
    """
    # training needs no more of the text than this: pieces repeat, so 10M words are about 180,000
    counts = Counter()
    progress = Progress("counting words", text_bytes(files))
    done = 0
    for block_counts, size in map_blocks(count_block, read_files(files)):
        counts.update(block_counts)
        done += size
        progress(done)
    return counts


def count_block(numbered_block: tuple[int, str]) -> tuple[dict[str, int], int]:
    """Count the pieces of a block; returns the bytes of the block, too."""
    _, block = numbered_block
    # No piece goes on from a word into the space behind it, so words can be cut by themselves, with
    # the space in front. They repeat: PATTERN, which is slow, then cuts each of them only once.
    words = Counter(WORD.findall(block))
    counts = {}
    for word, count in words.items():
        for piece in find_pieces(word):
            counts[piece] = counts.get(piece, 0) + count
    return counts, len(block.encode())


# ----------------------------------------------------------------------------- writing token files


def place_starts(
    ids: np.ndarray, boundary: str, newline: int, heading: list[int], opens_document: bool
) -> tuple[np.ndarray, int, bool]:
    """Put start tokens into the ids of whole lines, and drop blank lines.

    A document opens at the start of a file, after a blank line, and at a line that begins with the
    tokens of `heading` ("= = ="). With boundary "line" a start token also replaces the newline.
    opens_document: whether the first line opens a document
    Returns the ids, the number of documents, and whether the line after these opens one.
    """
    # where lines begin, and which of them are blank
    begins_line = np.append(True, ids[:-1] == newline)
    is_blank = begins_line & (ids == newline)
    is_first = begins_line & ~is_blank

    # where documents begin; -1 pads the ids for a heading that would reach beyond the end
    after_blank = np.append(opens_document, is_blank[:-1])
    padded = np.append(ids, np.full(len(heading), -1))
    is_heading = is_first.copy()
    for i, token in enumerate(heading):
        is_heading &= padded[i : i + len(ids)] == token
    begins_document = is_first & (after_blank | is_heading)

    # which ids stay, and in front of which a start token comes
    if boundary == "line":
        keep = ids != newline
        starts = np.flatnonzero(is_first)
    elif boundary == "document":
        keep = ~is_blank
        starts = np.flatnonzero(begins_document)
    else:
        keep = ~is_blank
        starts = np.zeros(0, np.int64)
    ids_with_starts = np.insert(ids, starts, START)
    keep = np.insert(keep, starts, True)
    return ids_with_starts[keep], int(begins_document.sum()), bool(is_blank[-1])


def encode_files(
    files: list[Path], out: Path, tokenizer: Tokenizer, boundary: str, map_blocks=map
) -> dict:
    """Encode text files into one token file and return what meta.json says of it.

    map_blocks: a function as map, which may work in several processes
    Memory grows with the longest line only. Raises UserError if the files hold no words.
    """
    newline = tokenizer.encode("\n")[0]
    heading = tokenizer.encode("= = =")
    stats = {
        "file": out.name,
        "dtype": tokenizer.dtype.name,
        "tokens": 0,
        "words": 0,
        "bytes": text_bytes(files),
        "documents": 0,
        "max_id": 0,
        "files": [],  # where each begins, so that a curriculum can tell sources apart
    }
    file_tokens = [0] * len(files)
    last_number = None
    digest = hashlib.sha256()
    progress = Progress("encoding", stats["bytes"])
    done = 0
    with open(out, "wb") as token_file:
        encode = partial(encode_block, tokenizer)
        for number, ids, words, size in map_blocks(encode, read_files(files)):
            # a file opens a document; other blocks go on where the one before ended
            if number != last_number:
                opens_document = True
                last_number = number
            ids, n_documents, opens_document = place_starts(
                ids, boundary, newline, heading, opens_document
            )
            raw = ids.astype(tokenizer.dtype).tobytes()
            token_file.write(raw)
            digest.update(raw)

            file_tokens[number] += len(ids)
            stats["words"] += words
            stats["documents"] += n_documents
            stats["max_id"] = max(stats["max_id"], int(ids.max(initial=0)))
            done += size
            progress(done)
    if stats["words"] == 0:
        raise UserError(f"{files[0]}: the {len(files)} input file(s) hold no words")

    for path, tokens in zip(files, file_tokens, strict=True):
        stats["files"].append({"name": str(path), "start": stats["tokens"]})
        stats["tokens"] += tokens
    stats["sha256"] = digest.hexdigest()
    return stats


def encode_block(
    tokenizer: Tokenizer, numbered_block: tuple[int, str]
) -> tuple[int, np.ndarray, int, int]:
    """Encode a block of whole lines, so that no token is cut at its end.

    Returns the number of its file, its ids, words and bytes.
    """
    number, block = numbered_block
    ids = tokenizer.bpe.encode_to_numpy(block, disallowed_special=())
    words = len(block.split())  # separated by spaces, as BabyLM counts
    return number, ids, words, len(block.encode())


# ------------------------------------------------------------------------------------ the program


def train_tokenizer(files: list[Path], path: Path, vocab_size: int, map_blocks=map):
    """Train a tokenizer on text files and write its tokenizer.json; raises UserError."""
    smallest = len(SPECIAL) + 256
    if vocab_size < smallest:
        raise UserError(
            f"--vocab_size {vocab_size}: must be at least {smallest}, for bytes and special tokens"
        )
    merges = train_bpe(count_pieces(files, map_blocks), vocab_size - smallest)
    size = smallest + len(merges)
    if size < vocab_size:
        print(f"the text has pairs for {len(merges)} merges: {size} tokens, not {vocab_size}")
    save_tokenizer(path, merges)


def prepare(
    train: list[str],
    dev: list[str],
    out: str,
    vocab_size: int = 16384,
    boundary: str = "line",
    tokenizer: str | None = None,
    processes: int = DEFAULT_PROCESSES,
) -> dict:
    """Make a corpus folder from text and return the content of its meta.json.

    The folder appears complete or not at all.
    tokenizer: a tokenizer.json to encode with; without it one is trained on the training text
    processes: that share the work; any number makes the same files
    Raises UserError for text or options that cannot be used.
    """
    settings = {"train": train, "dev": dev, "vocab_size": vocab_size, "tokenizer": tokenizer}
    folder = Path(out)

    # find mistakes before any work
    require(processes >= 1, f"--processes {processes}: must be at least 1")
    train_files = text_files(train)
    dev_files = text_files(dev)
    if folder.exists():
        raise UserError(f"{folder}: exists already; remove it or choose another --out")
    check_texts([*train_files, *dev_files])

    # the same files for any number of processes; a short text is done before they have started
    if sum(file.stat().st_size for file in [*train_files, *dev_files]) <= BLOCK_BYTES:
        processes = 1
    with new_folder(folder) as unfinished, start_workers(processes) as map_blocks:
        unfinished.mkdir()
        tokenizer_path = unfinished / "tokenizer.json"
        if tokenizer:
            # read before it is copied, so that an error names the user's file
            encoder = Tokenizer(tokenizer)
            shutil.copy(tokenizer, tokenizer_path)
        else:
            train_tokenizer(train_files, tokenizer_path, vocab_size, map_blocks)
            encoder = Tokenizer(tokenizer_path)
        train_file = unfinished / "train.bin"
        dev_file = unfinished / "dev.bin"
        meta = {
            "format": 1,
            "boundary": boundary,
            "vocab_size": encoder.vocab_size,
            "special": SPECIAL,
            "tokenizer_sha256": encoder.sha256,
            # each of these two writes its token file
            "train": encode_files(train_files, train_file, encoder, boundary, map_blocks),
            "dev": encode_files(dev_files, dev_file, encoder, boundary, map_blocks),
            "settings": settings,
        }
        write_json(unfinished / "meta.json", meta)
    return meta


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("train", nargs="+", metavar="TEXT", help="training text, files or folders")
    option("--dev", nargs="+", required=True, metavar="TEXT", help="development text, likewise")
    option("--out", required=True, help="folder to make")
    option(
        "--vocab_size",
        type=int,
        default=16384,
        help="number of tokens, among them 4 special ones and 256 bytes (default: %(default)s)",
    )
    option(
        "--boundary",
        default="line",
        choices=BOUNDARIES,
        help="what a start token stands in front of (default: %(default)s)",
    )
    option("--tokenizer", help="encode with this tokenizer.json (default: train one)")
    option(
        "--processes",
        type=int,
        default=DEFAULT_PROCESSES,
        help="number of processes that cut and encode the text (default: %(default)s)",
    )
    args = parser.parse_args()

    # make the corpus, and say how large it is
    began = time.time()
    meta = prepare(**vars(args))
    for split in (meta["train"], meta["dev"]):
        print(
            f"{args.out}/{split['file']}: {split['words']:,} words, {split['tokens']:,} tokens, "
            f"{split['documents']:,} documents"
        )
    seconds = time.time() - began
    size = meta["vocab_size"]
    print(f"{args.out}: vocabulary of {size:,}, boundary {args.boundary}; {seconds:.0f} s")


if __name__ == "__main__":
    with clean_exit():
        main()
