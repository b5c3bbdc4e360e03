"""Users' files are found and told by their kind.

python -m pytest tests/test_texts.py    # 1 s
"""

import bz2
import gzip
import io
import lzma
import os
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import pytest

from antlm.texts import find_files, open_text
from config import UserError

TEXT = "The ducks swim on the pond .\nThe ice thaws in March .\n" * 20

# ---------------------------------------------------------------------------------- finding files


def fill(folder: Path, *names: str):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}\n")


def found_in(folder: Path, *suffixes: str) -> list[str]:
    """Return the names of the files, relative to the folder."""
    return [str(path.relative_to(folder)) for path in find_files(folder, suffixes)]


def test_files_of_a_folder_come_sorted_and_nothing_is_said_of_them(tmp_path, capsys):
    names = ["A.txt", "a.train", "a/c/x.train", "a/x.txt", "b.txt", "b/x.train"]
    fill(tmp_path, *reversed(names))
    paths = find_files(tmp_path, (".train", ".txt"))
    assert paths == sorted(tmp_path / name for name in names)
    assert capsys.readouterr().err == ""


def test_hidden_names_are_left_out_and_said(tmp_path, capsys):
    hidden = [".ipynb_checkpoints/x-checkpoint.train", "deep/.x.train.swp", "._x.train"]
    fill(tmp_path, "x.train", "deep/y.train", *hidden)
    assert found_in(tmp_path, ".train") == ["deep/y.train", "x.train"]
    assert capsys.readouterr().err == f"{tmp_path}: left out 3 hidden (first ._x.train)\n"


def test_a_hidden_folder_that_is_named_is_read(tmp_path, monkeypatch, capsys):
    fill(tmp_path / ".cache", "x.train", "deep/y.train")
    monkeypatch.chdir(tmp_path / ".cache" / "deep")
    assert found_in(tmp_path / ".cache", ".train") == ["deep/y.train", "x.train"]
    assert find_files(Path("."), (".train",)) == [Path("y.train")]
    assert find_files(Path(".."), (".train",)) == [Path("../deep/y.train"), Path("../x.train")]
    assert capsys.readouterr().err == ""


def test_links_are_followed_and_nothing_is_read_twice(tmp_path, capsys):
    folder = tmp_path / "text"
    fill(folder, "m/x.train", "y.train")
    fill(tmp_path / "elsewhere", "z.train", "deep/z.train", "blob")
    (tmp_path / "elsewhere" / "deep" / "up").symlink_to("../../text")  # a loop over two links
    (folder / "a").symlink_to("../elsewhere")
    (folder / "b").symlink_to(tmp_path / "elsewhere" / "deep")
    (folder / "c").symlink_to(".")
    (folder / "d.train").symlink_to("m/x.train")
    (folder / "e.train").symlink_to("../elsewhere/blob")  # as caches link to files of any name
    os.link(folder / "y.train", folder / "z.train")
    names = ["a/deep/z.train", "a/z.train", "e.train", "m/x.train", "y.train"]
    assert found_in(folder, ".train") == names
    message = capsys.readouterr().err
    assert message.startswith(f"{folder}: left out 5 read already under another name (first ")
    assert message.endswith(", 1 ending in nothing (first a/blob)\n")
    assert message.count("\n") == 1


def test_a_link_to_a_link_loop_or_to_nothing_is_named(tmp_path):
    fill(tmp_path, "x.train")
    for target in ("nowhere", "y.train"):
        (tmp_path / "y.train").symlink_to(target)
        with pytest.raises(UserError, match=f"^{tmp_path}/y.train: is a link to nothing"):
            find_files(tmp_path, (".train",))
        (tmp_path / "y.train").unlink()


def test_every_ending_that_is_not_read_is_said(tmp_path, capsys):
    fill(tmp_path, "a.train", "README.md", "LICENSE", "b.train.zst", "deep/b.zip", "deep/c.zip")
    os.mkfifo(tmp_path / "p.train")
    assert found_in(tmp_path, ".train") == ["a.train"]
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith(f"{tmp_path}: left out ")
    for part in (
        "1 ending in .md (first README.md)",
        "1 ending in nothing (first LICENSE)",
        "1 ending in .zst (first b.train.zst)",
        "2 ending in .zip (first deep/b.zip)",
        "1 a pipe or a device (first p.train)",
    ):
        assert part in message

    # however many there are, it is one line of some words
    fill(tmp_path, *[f"x.{i}" for i in range(100)])
    assert found_in(tmp_path, ".train") == ["a.train"]
    message = capsys.readouterr().err
    assert message.endswith(", others\n")
    assert len(message) < 600


@pytest.mark.parametrize("names", [(), ("x.zip", ".x.train", "deep/y.zip")])
def test_a_folder_without_such_files_is_an_error_that_says_what_is_in_it(tmp_path, names):
    fill(tmp_path, *names)
    with pytest.raises(UserError) as error:
        find_files(tmp_path, (".train", ".txt"))
    message = str(error.value)
    assert message.startswith(f"{tmp_path}: holds no .train, .txt file; left out: ")
    if names:
        assert message.endswith("1 hidden (first .x.train), 2 ending in .zip (first deep/y.zip)")
    else:
        assert message.endswith("nothing")


def test_a_file_that_is_named_is_read_whatever_its_ending(tmp_path):
    fill(tmp_path, ".x.md")
    assert find_files(tmp_path / ".x.md", (".train",)) == [tmp_path / ".x.md"]
    with pytest.raises(UserError, match=f"^{tmp_path}/nowhere.train: does not exist"):
        find_files(tmp_path / "nowhere.train", (".train",))


# --------------------------------------------------------------------------------- kinds of files


def packed(write) -> bytes:
    """Return what a function writes into an open binary file."""
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def write_zip(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.train", TEXT)


def write_tar(file):
    member = tarfile.TarInfo("x.train")
    member.size = len(TEXT)
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(member, io.BytesIO(TEXT.encode()))


def sqlite() -> bytes:
    database = sqlite3.connect(":memory:")
    database.execute("create table texts (line)")
    return database.serialize()


OTHER_KINDS = {
    "compressed by bzip2": bz2.compress(TEXT.encode()),
    "compressed by xz": lzma.compress(TEXT.encode()),
    "a zip archive": packed(write_zip),
    "a tar archive": packed(write_tar),
    "an SQLite database": sqlite(),
    # how they begin by their specifications
    "compressed by zstd": bytes.fromhex("28b52ffd") + b"\x24\x05",
    "compressed by lz4": bytes.fromhex("04224d18") + b"\x64\x40",
    "a Parquet table": b"PAR1\x15\x04\x15\x20",
    "an Arrow table": b"ARROW1\0\0",
    "a 7z archive": b"7z\xbc\xaf\x27\x1c",
    "a rar archive": b"Rar!\x1a\x07\x01\0",
    "a PDF": b"%PDF-1.7\n",
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_file_that_is_no_text_is_named_for_what_it_is(tmp_path, kind, pack):
    (tmp_path / "x").write_bytes(pack(OTHER_KINDS[kind]))
    with pytest.raises(UserError, match=f"^{tmp_path}/x: is {kind}, not text; "):
        with open_text(tmp_path / "x"):
            pass


SCRIPTS = {
    "Latin": TEXT,
    "one word": "duck",
    "Greek": "Οι πάπιες κολυμπούν στη λίμνη .\n" * 20,
    "Cyrillic": "Утки плавают в пруду , и лёд тает .\n" * 20,
    "Devanagari": "बत्तख तालाब में तैरती है ।\n" * 20,
}


@pytest.mark.parametrize("encoding", ["UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["no mark", "mark"])
@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_utf_16_and_32_are_refused_with_the_advice_that_reads_them(tmp_path, text, mark, encoding):
    raw = (mark + text).encode(encoding)
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(UserError) as error:
        with open_text(tmp_path / "x"):
            pass
    line = str(error.value)
    named = line.partition("iconv -f ")[2].split()[0]
    assert line == (
        f"{tmp_path}/x: is text in {named}, not UTF-8; convert it with iconv -f {named} -t UTF-8"
    )
    assert raw.decode(named) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\0",
        "a\0",
        "a\0b\n" + TEXT,
        "\0" * 4096,
        "\ufeff" + TEXT,
        "PK is a name\n",
        "PAR1\n",
        "BZh9\n",
        "\U0010ffff" * 99,
        "世界" * 200,
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_text_is_taken_for_text(tmp_path, text):
    (tmp_path / "x").write_text(text, "utf-8")
    (tmp_path / "x.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("x", "x.gz"):
        with open_text(tmp_path / name) as file:
            assert file.read() == text.encode()
