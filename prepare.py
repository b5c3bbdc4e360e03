"""Text to tokenizer and token files. No torch.

    python prepare.py TEXT... --dev TEXT... --out corpora/babylm --vocab_size 16384

TEXT is a file or a folder of .train, .dev or .txt files in UTF-8, plain or as .gz. The folder --out
then holds tokenizer.json, train.bin and dev.bin (token ids, no header) and meta.json, which says
what is in them.
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
from config import UserError, require

TEXT_SUFFIXES = (".train", ".dev", ".txt")
GZIP_SUFFIXES = (".train.gz", ".dev.gz", ".txt.gz")
BLOCK_BYTES = 1 << 22  # of text held in memory at a time


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


def count_pieces(files: list[Path]) -> Counter:
    """Count the pieces of text (words, numbers, ...) that PATTERN finds in the files."""
    # training needs no more of the text than this: pieces repeat, so 10M words are about 180,000
    counts = Counter()
    find_pieces = regex.compile(PATTERN).findall
    progress = Progress("counting words", text_bytes(files))
    done = 0
    for path in files:
        for block in read_blocks(path):
            counts.update(find_pieces(block))
            done += len(block)
            progress(done)
    return counts


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


def encode_files(files: list[Path], out: Path, tokenizer: Tokenizer, boundary: str) -> dict:
    """Encode text files into one token file and return what meta.json says of it.

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
    digest = hashlib.sha256()
    progress = Progress("encoding", stats["bytes"])
    done = 0
    with open(out, "wb") as token_file:
        for path in files:
            stats["files"].append({"name": str(path), "start": stats["tokens"]})
            opens_document = True
            for block in read_blocks(path):
                # whole lines only, so no token is cut at the end of a block
                ids = tokenizer.bpe.encode_to_numpy(block, disallowed_special=())
                ids, n_documents, opens_document = place_starts(
                    ids, boundary, newline, heading, opens_document
                )
                raw = ids.astype(tokenizer.dtype).tobytes()
                token_file.write(raw)
                digest.update(raw)

                stats["tokens"] += len(ids)
                stats["words"] += len(block.split())  # separated by spaces, as BabyLM counts
                stats["documents"] += n_documents
                stats["max_id"] = max(stats["max_id"], int(ids.max(initial=0)))
                done += len(block)
                progress(done)
    if stats["words"] == 0:
        raise UserError(f"{files[0]}: the {len(files)} input file(s) hold no words")
    stats["sha256"] = digest.hexdigest()
    return stats


# ------------------------------------------------------------------------------------ the program


def train_tokenizer(files: list[Path], path: Path, vocab_size: int):
    """Train a tokenizer on text files and write its tokenizer.json; raises UserError."""
    smallest = len(SPECIAL) + 256
    if vocab_size < smallest:
        raise UserError(
            f"--vocab_size {vocab_size}: must be at least {smallest}, for bytes and special tokens"
        )
    merges = train_bpe(count_pieces(files), vocab_size - smallest)
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
) -> dict:
    """Make a corpus folder from text and return the content of its meta.json.

    The folder appears complete or not at all.
    tokenizer: a tokenizer.json to encode with; without it one is trained on the training text
    Raises UserError for text or options that cannot be used.
    """
    settings = {"train": train, "dev": dev, "vocab_size": vocab_size, "tokenizer": tokenizer}
    folder = Path(out)

    # find mistakes before any work
    train_files = text_files(train)
    dev_files = text_files(dev)
    if folder.exists():
        raise UserError(f"{folder}: exists already; remove it or choose another --out")
    check_texts([*train_files, *dev_files])

    with new_folder(folder) as unfinished:
        unfinished.mkdir()
        if tokenizer:
            encoder = Tokenizer(
                tokenizer
            )  # before the copy, so that an error names the user's file
            shutil.copy(tokenizer, unfinished / "tokenizer.json")
        else:
            train_tokenizer(train_files, unfinished / "tokenizer.json", vocab_size)
            encoder = Tokenizer(unfinished / "tokenizer.json")
        meta = {
            "format": 1,
            "boundary": boundary,
            "vocab_size": encoder.vocab_size,
            "special": SPECIAL,
            "tokenizer_sha256": encoder.sha256,
            # each of these two writes its token file
            "train": encode_files(train_files, unfinished / "train.bin", encoder, boundary),
            "dev": encode_files(dev_files, unfinished / "dev.bin", encoder, boundary),
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
