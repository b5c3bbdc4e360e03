"""Users' files: found, told by their kind, opened."""

import gzip
import heapq
import re
import sys
import zlib
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

from config import UserError, require

# How files begin that may lie where text is expected.
SIGNATURES = {
    rb"\x1f\x8b": "compressed by gzip",
    rb"BZh[1-9]1AY&SY": "compressed by bzip2",
    rb"\xfd7zXZ\x00": "compressed by xz",
    rb"\x28\xb5\x2f\xfd": "compressed by zstd",
    rb"\x04\x22\x4d\x18": "compressed by lz4",
    rb"PK\x03\x04": "a zip archive",
    rb"7z\xbc\xaf\x27\x1c": "a 7z archive",
    rb"Rar!\x1a\x07": "a rar archive",
    rb"(?s:.{257})ustar": "a tar archive",
    rb"PAR1\x15": "a Parquet table",
    rb"ARROW1": "an Arrow table",
    rb"SQLite format 3\x00": "an SQLite database",
    rb"%PDF-": "a PDF",
}
BYTE_ORDER_MARKS = {  # the longer ones first
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
START_BYTES = 512  # of a file, which tell its kind
MAX_REASONS = 8  # for leaving files out, in the line that says so


def find_files(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Return a file that is named, or a folder's files that end in one of the suffixes, sorted.

    What is left out of a folder is said in one line on stderr.
    Raises UserError for a path that holds nothing to read, for a pipe and for a link to nothing.
    """
    endings = ", ".join(suffixes)
    require(root.exists(), f"{root}: does not exist; name a file, or a folder of {endings} files")
    if not root.is_dir():
        require(
            root.is_file(),
            f"{root}: is a pipe or a device, and text is read more than once; "
            "write it to a file, and name that",
        )
        return [root]

    files, left_out = walk(root, suffixes)
    reasons = []
    for reason, paths in left_out.items():
        reasons.append(f"{len(paths)} {reason} (first {min(paths).relative_to(root)})")
    if len(reasons) > MAX_REASONS:
        reasons[MAX_REASONS:] = ["others"]
    summary = ", ".join(reasons) or "nothing"
    require(files, f"{root}: holds no {endings} file; left out: {summary}")
    if reasons:
        print(f"{root}: left out {summary}", file=sys.stderr, flush=True)
    return files


def walk(root: Path, suffixes: tuple[str, ...]) -> tuple[list[Path], dict[str, list[Path]]]:
    """Return a folder's files that end in one of the suffixes, and what is left out, by reason.

    Hidden names are left out: Jupyter, editors and Macs keep copies under them. Links are followed,
    but nothing is read twice.
    """
    files = []
    left_out = defaultdict(list)
    seen = set()
    # (is a link, path), the smallest first: a link never takes the place of what it leads to
    paths = [(False, root)]
    while paths:
        _, path = heapq.heappop(paths)
        require(path.exists(), f"{path}: is a link to nothing; mend or remove it")
        status = path.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            left_out["read already under another name"].append(path)
        elif path.is_dir():
            seen.add(identity)
            for child in path.iterdir():
                if child.name.startswith("."):
                    left_out["hidden"].append(child)
                else:
                    heapq.heappush(paths, (child.is_symlink(), child))
        elif not path.is_file():
            left_out["a pipe or a device"].append(path)
        elif path.name.endswith(suffixes):
            seen.add(identity)
            files.append(path)
        else:
            left_out[f"ending in {path.suffix or 'nothing'}"].append(path)
    return sorted(files), left_out


def wide_encoding(start: bytes) -> str | None:
    """Return the UTF-16 or UTF-32 in which a text begins, None for any other text."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            return encoding

    # Without a mark: in UTF-16, the upper bytes of Latin letters are NUL, and in any script those
    # of spaces and newlines. A few NULs may stand in other text.
    n_even = start[::2].count(0)
    n_odd = start[1::2].count(0)
    few = 1 + len(start) // 20
    if n_odd > few and n_even == 0:
        return "UTF-16LE"
    if n_even > few and n_odd == 0:
        return "UTF-16BE"
    # nearly all bytes of other text are numbers in UTF-32 that no character has
    for encoding in ("UTF-32LE", "UTF-32BE"):
        try:
            if start[: len(start) // 4 * 4].decode(encoding).strip("\0"):
                return encoding
        except UnicodeDecodeError:
            pass
    return None


def refuse_other_kinds(path: Path, start: bytes):
    """Raise UserError if a file begins as no text in UTF-8 does; start: its first START_BYTES."""
    for signature, kind in SIGNATURES.items():
        if re.match(signature, start):
            raise UserError(f"{path}: is {kind}, not text; take the text out of it first")
    encoding = wide_encoding(start)
    if encoding:
        raise UserError(
            f"{path}: is text in {encoding}, not UTF-8; "
            f"convert it with iconv -f {encoding} -t UTF-8"
        )


@contextmanager
def open_text(path: Path):
    """Open a file of text to read its bytes, unpacked if gzip has compressed it.

    Raises UserError, then or while it is read, for another kind of file and for a damaged .gz.
    """
    with open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        text = gzip.GzipFile(fileobj=file) if is_gzip else file
        try:
            refuse_other_kinds(path, text.read(START_BYTES))
            text.seek(0)
            yield text
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: is damaged or cut short ({error}); copy it anew") from None
