"""Files are written completely or not at all.

python -m pytest tests/test_files.py    # 1 s
"""

import errno
import json
import os

import pytest

from antlm.files import Progress, write_json, write_whole


def disk_is_full(file):
    file.write(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def disk_is_full_for_torch(file):
    """As torch.save does: the OSError is being handled when a RuntimeError follows it."""
    try:
        disk_is_full(file)
    except OSError:
        raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904


@pytest.mark.parametrize("write", [disk_is_full, disk_is_full_for_torch])
def test_a_full_disk_names_the_file_and_leaves_it_as_it_was(tmp_path, write):
    path = tmp_path / "precious"
    path.write_bytes(b"before")
    with pytest.raises(OSError) as error:
        write_whole(path, write)
    assert error.value.filename == str(path)
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["precious"]


def test_an_error_of_the_writer_passes_and_leaves_nothing(tmp_path):
    def broken(file):
        raise RuntimeError("not about files")

    with pytest.raises(RuntimeError, match="not about files"):
        write_whole(tmp_path / "new", broken)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        write_json(tmp_path / "nowhere" / "x.json", {})


def test_json_replaces_a_file_and_reads_back(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    write_json(path, {"words": ["naïve", "世界"], "n": 1})
    assert json.loads(path.read_text("utf-8")) == {"words": ["naïve", "世界"], "n": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_json_holds_file_names_that_are_not_utf_8(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / "x.json", {"name": name})
    assert json.loads((tmp_path / "x.json").read_text("utf-8")) == {"name": name}


def test_progress_says_how_long_the_rest_takes(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr("time.time", lambda: clock[0])
    progress = Progress("counting", total=40)
    clock[0] = 101.0
    progress(5)  # too soon for a line
    clock[0] = 110.0
    progress(10)
    assert capsys.readouterr().err == "counting: 25%, about 30 s left\n"
