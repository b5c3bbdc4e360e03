"""Users' files are found and told by their kind.

python -m pytest tests/test_texts.py    # 1 s
"""

import bz2
import errno
import gzip
import io
import lzma
import os
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


def test_links_are_followed_and_no_file_is_read_under_two_names(tmp_path, capsys):
    folder = tmp_path / "text"
    fill(folder, "m/x.train", "y.train")
    fill(tmp_path / "elsewhere", "z.train", "deep/z.train", "blob")
    (tmp_path / "elsewhere" / "deep" / "up").symlink_to("../../text")  # a loop over two links
    (folder / "a").symlink_to("../elsewhere")
    (folder / "b").symlink_to(tmp_path / "elsewhere" / "deep")
    (folder / "c").symlink_to(".")
    (folder / "d.train").symlink_to("m/x.train")
    (folder / "e.train").symlink_to("../elsewhere/blob")  # as caches link to files of any name
    paths = find_files(folder, (".train",))
    contents = sorted(path.read_text() for path in paths)
    expected = ["blob", "deep/z.train", "m/x.train", "y.train", "z.train"]
    assert contents == [f"text of {name}\n" for name in expected]
    assert paths == sorted(paths) == find_files(folder, (".train",))
    line = f"{folder}: left out 1 of other endings (first a/blob)\n"
    assert capsys.readouterr().err == 2 * line


@pytest.mark.parametrize("target", ["nowhere", "y.train", "pipe"])
def test_a_text_that_is_no_file_is_named(tmp_path, target):
    fill(tmp_path, "x.train")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "y.train").symlink_to(target)
    with pytest.raises(UserError, match=f"^{tmp_path}/y.train: is a pipe or a link to nothing"):
        find_files(tmp_path, (".train",))


def test_a_pipe_that_is_named_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.train")
    with pytest.raises(UserError, match=f"^{tmp_path}/x.train: is a pipe "):
        find_files(tmp_path / "x.train", (".train",))


def test_what_is_left_out_is_one_short_line(tmp_path, capsys):
    names = ["a.train", "README.md", "LICENSE", "b.train.zst", "deep/b.zip", ".x", "deep/.x/y"]
    fill(tmp_path, *names, *[f"deep/x.{i}" for i in range(100)])
    (tmp_path / "link.md").symlink_to("nowhere")
    assert found_in(tmp_path, ".train") == ["a.train"]
    assert capsys.readouterr().err == (
        f"{tmp_path}: left out 2 hidden (first .x), 105 of other endings (first LICENSE)\n"
    )


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    """Not a folder without text; root may read any, so the error is made here."""
    fill(tmp_path, "x.train", "deep/y.train")
    iterdir = Path.iterdir

    def guarded(folder: Path):
        if folder.name == "deep":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", guarded)
    with pytest.raises(PermissionError, match="deep"):
        find_files(tmp_path, (".train",))


@pytest.mark.parametrize("names", [(), ("x.zip", ".x.train", "deep/y.zip")])
def test_a_folder_without_such_files_is_an_error_that_says_what_is_in_it(tmp_path, names):
    fill(tmp_path, *names)
    with pytest.raises(UserError) as error:
        find_files(tmp_path, (".train", ".txt"))
    message = str(error.value)
    assert message.startswith(f"{tmp_path}: holds no .train, .txt file; left out: ")
    if names:
        assert message.endswith("1 hidden (first .x.train), 2 of other endings (first deep/y.zip)")
    else:
        assert message.endswith("nothing")


def test_a_file_that_is_named_is_read_whatever_its_ending(tmp_path):
    fill(tmp_path, ".x.md")
    assert find_files(tmp_path / ".x.md", (".train",)) == [tmp_path / ".x.md"]
    with pytest.raises(UserError, match=f"^{tmp_path}/nowhere.train: does not exist"):
        find_files(tmp_path / "nowhere.train", (".train",))


# --------------------------------------------------------------------------------- kinds of files


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.train", TEXT)
    return file.getvalue()


OTHER_KINDS = {
    "compressed by bzip2": bz2.compress(TEXT.encode()),
    "compressed by xz": lzma.compress(TEXT.encode()),
    "a zip archive": zipped(),
    # how they begin by their specifications
    "compressed by zstd": bytes.fromhex("28b52ffd") + b"\x24\x05",
    "a Parquet table": b"PAR1\x15\x04\x15\x20",
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_file_that_is_no_text_is_named_for_what_it_is(tmp_path, kind, pack):
    (tmp_path / "x").write_bytes(pack(OTHER_KINDS[kind]))
    with pytest.raises(UserError, match=f"^{tmp_path}/x: is {kind}, not text in UTF-8; "):
        with open_text(tmp_path / "x"):
            pass


def test_text_that_is_compressed_twice_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(gzip.compress(gzip.compress(TEXT.encode())))
    with pytest.raises(UserError, match="x: is compressed by gzip, not text in UTF-8; "):
        with open_text(tmp_path / "x"):
            pass


SCRIPTS = {
    "Latin": TEXT,
    "one word": "duck",
    "Greek": "Οι πάπιες κολυμπούν στη λίμνη .\n" * 20,
    "Cyrillic": "Утки плавают в пруду , и лёд тает .\n" * 20,
    "Devanagari": "बत्तख तालाब में तैरती है ।\n" * 20,
}


@pytest.mark.parametrize("encoding", ["UTF-16LE", "UTF-16BE"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["no mark", "mark"])
@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_text_in_utf_16_is_refused_with_and_without_a_mark(tmp_path, text, mark, encoding):
    (tmp_path / "x").write_bytes((mark + text).encode(encoding))
    with pytest.raises(UserError, match=f"^{tmp_path}/x: is text in UTF-16, not text in UTF-8; "):
        with open_text(tmp_path / "x"):
            pass


@pytest.mark.parametrize(
    "text",
    [
        "",
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
