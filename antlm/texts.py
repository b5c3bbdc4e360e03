"""Users' files: found, told by their kind, opened."""

import gzip
import os
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path

from config import UserError, require

# how files begin that may lie where text in UTF-8 is expected
SIGNATURES = {
    b"\x1f\x8b": "compressed by gzip",
    b"BZh91AY&SY": "compressed by bzip2",
    b"\xfd7zXZ\0": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"PK\x03\x04": "a zip archive",
    b"PAR1\x15": "a Parquet table",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
    b"\xff\xfe\0\0": "text in UTF-32",
}
START_BYTES = 512  # of a file, which tell its kind


def find_files(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Return a file that is named, or a folder's files that end in one of the suffixes, sorted.

    What is left out of a folder is said in one line on stderr.
    Raises UserError for a path that holds nothing to read, for a pipe and for a link to nothing.
    """
    endings = ", ".join(suffixes)
    require(root.exists(), f"{root}: does not exist; name a file, or a folder of {endings} files")
    files = [root]
    if root.is_dir():
        files, left_out = sort_out(root, suffixes)
        require(files, f"{root}: holds no {endings} file; left out: {left_out or 'nothing'}")
        if left_out:
            print(f"{root}: left out {left_out}", file=sys.stderr, flush=True)
    for path in files:
        require(path.is_file(), f"{path}: is a pipe or a link to nothing; make it a file")
    return files


def sort_out(root: Path, suffixes: tuple[str, ...]) -> tuple[list[Path], str]:
    """Return a folder's files that end in one of the suffixes, and a summary of the others."""
    files = {}  # by their real paths, so that no link makes a file come twice
    left_out = {"hidden": [], "of other endings": []}
    for path in walk(root, set()):
        if path.name.startswith("."):
            left_out["hidden"].append(path)
        elif path.name.endswith(suffixes):
            files.setdefault(os.path.realpath(path), path)
        else:
            left_out["of other endings"].append(path)
    parts = []
    for reason, paths in left_out.items():
        if paths:
            parts.append(f"{len(paths)} {reason} (first {paths[0].relative_to(root)})")
    return sorted(files.values()), ", ".join(parts)


def walk(folder: Path, seen: set[str]):
    """Yield the files of a folder and of the folders in it; of hidden folders only their names.

    Jupyter, editors and Macs keep copies under hidden names. Links come last, so that names
    of real folders, by which tasks are called, are kept.
    seen: real paths of the folders entered so far, to which links may lead back
    """
    real_path = os.path.realpath(folder)
    if real_path in seen:
        return
    seen.add(real_path)
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_symlink(), path)):
        if path.is_dir() and not path.name.startswith("."):
            yield from walk(path, seen)
        else:
            yield path


def refuse_other_kinds(path: Path, start: bytes):
    """Raise UserError if a file begins as no text in UTF-8 does; start: its first START_BYTES."""
    kind = None
    for signature, name in SIGNATURES.items():
        if start.startswith(signature):
            kind = name
    # UTF-16 without a mark: the upper bytes of Latin letters and of any script's spaces are NUL
    n_even = start[::2].count(0)
    n_odd = start[1::2].count(0)
    if max(n_even, n_odd) > len(start) // 20 and min(n_even, n_odd) == 0:
        kind = "text in UTF-16"
    require(kind is None, f"{path}: is {kind}, not text in UTF-8; convert it first")


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
