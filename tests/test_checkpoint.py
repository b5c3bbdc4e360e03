"""Checkpoints: what is saved comes back bit for bit, and damage is noticed and named.

python -m pytest tests/test_checkpoint.py
"""

import hashlib
import os
import random
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from antlm.checkpoint import (
    checkpoints,
    file_sha256,
    load_checkpoint,
    load_model,
    load_newest,
    load_run,
    save_checkpoint,
)
from antlm.optim import OPTIMIZERS, guarded_step, make_optimizers
from antlm.tokenizer import Tokenizer, save_tokenizer
from config import UserError
from model import BACKBONES, ModelConfig, Transformer
from train import Settings

SETTINGS = {"lr": 1e-3, "schedule": "1_CLM", "block_size": 16, "resume": False}
SIZES = dict(vocab_size=7, n_layer=1, n_head=1, n_embd=4, n_ff=4, n_bucket=2, max_position=8)
TOKENS = torch.arange(6).view(1, 6)


def identical(a, b) -> bool:
    """Compare bit for bit: tensors by type, shape and bytes, plain data by type and text."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        same_kind = (a.dtype, a.shape) == (b.dtype, b.shape)
        return same_kind and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    return repr(a) == repr(b)


def trained_model(backbone: str = "babyllama", optimizer: str = "adamw"):
    """Return a tiny model after one step, and its optimizers."""
    torch.manual_seed(11)
    model = Transformer(ModelConfig(backbone, **SIZES, tied=True))
    optimizers = make_optimizers(model, Settings(optimizer=optimizer), torch.device("cpu"))
    loss, _ = model(TOKENS, TOKENS, causal=True)
    loss.backward()
    guarded_step(optimizers, 1e-3, torch.tensor(1.0))
    return model, optimizers


@pytest.fixture
def path(tmp_path) -> Path:
    """A checkpoint of step 1, as train.py writes it."""
    model, optimizers = trained_model()
    path = tmp_path / "step_0000001.pt"
    states = [optimizer.state_dict() for optimizer in optimizers]
    save_checkpoint(path, model, step=1, settings=SETTINGS, optimizer=states)
    return path


def refusal(path: Path) -> str:
    """The one line that says why a checkpoint cannot be loaded."""
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path, backbone, optimizer):
    model, optimizers = trained_model(backbone, optimizer)
    states = [part.state_dict() for part in optimizers]
    path = tmp_path / "step_0000001.pt"
    save_checkpoint(path, model, step=1, settings=SETTINGS, optimizer=states)
    content = load_checkpoint(path)
    assert identical(content["model"], dict(model.state_dict()))
    assert identical(content["optimizer"], states)
    assert content["settings"] == SETTINGS
    assert content["step"] == 1
    assert os.listdir(tmp_path) == [path.name]  # nothing temporary stays behind


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_model_of_a_checkpoint_is_the_one_that_was_saved(tmp_path, backbone):
    model, _ = trained_model(backbone)
    path = tmp_path / "step_0000001.pt"
    save_checkpoint(path, model)
    loaded = load_model(load_checkpoint(path))
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.head.vocab.weight is loaded.embedding.tokens.weight  # still tied
    assert torch.equal(loaded(TOKENS, causal=False), model.eval()(TOKENS, causal=False))


def test_a_checkpoint_is_plain_data(path):
    content = torch.load(path, weights_only=True)
    assert content["config"]["n_embd"] == 4


def test_a_failed_save_leaves_the_old_checkpoint(path):
    before = path.read_bytes()
    model, _ = trained_model()
    with pytest.raises(TypeError, match="generator"):
        save_checkpoint(path, model, step=2, settings=(name for name in "ab"))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_the_identity_of_a_checkpoint_is_the_hash_of_its_file(path):
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


# --------------------------------------------------------------------------------- which is newest


def test_checkpoints_are_listed_newest_first(tmp_path):
    for name in (
        "step_0000009.pt",
        "step_0001000.pt",
        "step_0000020.pt",
        "step_best.pt",
        ".step_0002000.pt.part",
    ):
        (tmp_path / name).touch()
    names = [file.name for file in checkpoints(tmp_path)]
    assert names == ["step_0001000.pt", "step_0000020.pt", "step_0000009.pt"]


def test_a_damaged_newest_checkpoint_is_named_and_passed_over(path):
    newest = path.with_name("step_0000002.pt")
    newest.write_bytes(path.read_bytes()[:-1])
    warnings = []
    newest_whole, content = load_newest(path.parent, warnings.append)
    assert newest_whole == path
    assert content["step"] == 1
    assert len(warnings) == 1
    assert warnings[0].startswith(f"skipped {newest}: ")


def test_a_folder_without_a_whole_checkpoint_has_no_newest(path):
    path.write_bytes(b"")
    warnings = []
    assert load_newest(path.parent, warnings.append) == (None, None)
    assert len(warnings) == 1


# -------------------------------------------------------------------------------------- damage


def flip_bit(path: Path, data: bytes, place: int, bit: int):
    damaged = bytearray(data)
    damaged[place] ^= 1 << bit
    path.write_bytes(damaged)


def noticed(path: Path, content: dict) -> bool:
    """Whether loading refuses a damaged file; if not, it must give the very same content."""
    try:
        damaged = load_checkpoint(path)
    except UserError as error:
        assert str(error).startswith(f"{path}: ")
        assert "\n" not in str(error)
        return True
    assert identical(damaged, content), "damage went unnoticed"
    return False


def start_of(data: bytes, record: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin: behind its header, its name and the padding of torch.save."""
    header = data[record.header_offset :][:30]
    n_name = int.from_bytes(header[26:28], "little")
    n_padding = int.from_bytes(header[28:30], "little")
    return record.header_offset + 30 + n_name + n_padding


@pytest.mark.parametrize("part", [0, 0.5, 1])
def test_a_flipped_bit_in_any_record_is_noticed(path, part):
    """Weights, moments, settings and names: at the beginning, in the middle and at the end."""
    data = path.read_bytes()
    content = load_checkpoint(path)
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    n_tensor = len(content["model"]) + 2 * len(content["optimizer"][0]["state"])
    assert len(records) > n_tensor
    for record in records:
        if record.file_size > 0:
            place = start_of(data, record) + int(part * (record.file_size - 1))
            flip_bit(path, data, place, bit=5)
            assert noticed(path, content), record.filename


@pytest.mark.slow
def test_a_flipped_bit_in_the_directory_of_records_is_never_taken_for_good(path):
    """In every byte that the directory has on one tensor, and in the last bytes of the file."""
    data = path.read_bytes()
    content = load_checkpoint(path)
    name = b"archive/data/0"
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    entry = data.index(name, directory) - 46
    end_of_entry = entry + 46 + len(name)
    end = range(len(data) - 98, len(data))
    n_noticed = 0
    for place in [*range(entry, end_of_entry), *end]:
        for bit in range(0, 8, 2):
            flip_bit(path, data, place, bit)
            n_noticed += noticed(path, content)
    assert n_noticed > 300


def test_a_tensor_that_is_marked_as_a_folder_is_refused(path):
    """Its checksum is right, but torch.load leaves the memory of such a record unwritten."""
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    entry = data.index(b"archive/data/0", directory) - 46
    flip_bit(path, data, entry + 38, bit=4)
    assert "damaged" in refusal(path)


@pytest.mark.slow
def test_a_flipped_bit_anywhere_is_never_taken_for_good(path):
    data = path.read_bytes()
    content = load_checkpoint(path)
    generator = random.Random(3)
    n_noticed = 0
    for place in generator.sample(range(len(data)), 300):
        flip_bit(path, data, place, generator.randrange(8))
        n_noticed += noticed(path, content)
    assert n_noticed > 100


def test_a_truncated_checkpoint_is_refused(path):
    data = path.read_bytes()
    for size in (0, 1, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        refusal(path)


@pytest.mark.parametrize("data", [b"", b"lr = 1e-3\n", b"PK\x03\x04" + bytes(100)])
def test_other_files_are_refused(tmp_path, data):
    path = tmp_path / "model.pt"
    path.write_bytes(data)
    refusal(path)


def test_other_content_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    torch.save([1, 2], path)
    assert "not a checkpoint of train.py" in refusal(path)


def test_a_missing_checkpoint_is_named(tmp_path):
    assert "No such file" in refusal(tmp_path / "model.pt")


class Planted:
    """An object whose unpickling makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_planted_code_does_not_run(tmp_path):
    path = tmp_path / "step_0000001.pt"
    folder = tmp_path / "made by planted code"
    torch.save({"step": 1, "model": Planted(folder)}, path)
    assert "code" in refusal(path)
    assert not folder.exists()
    torch.load(path, weights_only=False)
    assert folder.exists()  # the code was live


# ------------------------------------------------------------------------------- load_model


@pytest.mark.parametrize(
    "changes",
    [
        dict(n_embd=8),
        dict(n_layer=2),
        dict(n_head=3),  # n_embd is no multiple of it
        dict(n_heads=1),  # no such size
        dict(backbone="ltg_bert"),
        dict(backbone="gpt2"),
    ],
)
def test_sizes_that_contradict_the_weights_are_refused(path, changes):
    content = load_checkpoint(path)
    load_model(content)
    content["config"].update(changes)
    with pytest.raises(UserError, match="^x.pt: not a checkpoint of this model.py") as error:
        load_model(content, path="x.pt")
    assert "\n" not in str(error.value)


def test_weights_that_contradict_the_sizes_are_refused(path):
    content = load_checkpoint(path)
    weights = content["model"]
    norm = weights["head.norm.weight"]
    missing = {name: weight for name, weight in weights.items() if weight is not norm}
    for changed in (missing, weights | {"extra": norm}, weights | {"head.norm.weight": norm[:2]}):
        with pytest.raises(UserError, match="^x.pt: not a checkpoint of this model.py"):
            load_model(content | {"model": changed}, path="x.pt")


@pytest.mark.parametrize("name", ["model", "config"])
def test_a_checkpoint_without_a_model_is_refused(path, name):
    content = load_checkpoint(path)
    del content[name]
    with pytest.raises(UserError, match=f"^x.pt: .*{name}"):
        load_model(content, path="x.pt")


# --------------------------------------------------------------------------------- load_run


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder with checkpoints of two steps and the tokenizer that they name."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_tokenizer(folder / "tokenizer.json", [])
    tokenizer = Tokenizer(folder / "tokenizer.json")
    model, _ = trained_model()
    for step in (1, 2):
        save_checkpoint(
            folder / f"step_{step:07}.pt",
            model,
            step=step,
            settings=SETTINGS,
            boundary="line",
            tokenizer_sha256=tokenizer.sha256,
        )
    return folder


def run_refusal(path: Path) -> str:
    """The one line that says why a run cannot be loaded."""
    with pytest.raises(UserError) as error:
        load_run(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_folder_gives_its_newest_checkpoint(run):
    loaded = load_run(str(run))
    assert loaded.path == run / "step_0000002.pt"
    assert loaded.step == 2
    assert loaded.schedule == "1_CLM"
    assert loaded.block_size == 16
    assert loaded.boundary == "line"
    assert loaded.settings == SETTINGS
    assert asdict(loaded.model.config) == loaded.content["config"]
    assert not loaded.model.training
    assert loaded.tokenizer.encode("a") != []


def test_a_checkpoint_of_a_run_can_be_named(run):
    assert load_run(str(run / "step_0000001.pt")).step == 1


def test_a_run_passes_over_a_damaged_checkpoint_and_says_so(run, capsys):
    (run / "step_0000002.pt").write_bytes(b"")
    assert load_run(str(run)).step == 1
    assert f"skipped {run}/step_0000002.pt: " in capsys.readouterr().err


def test_a_path_that_is_not_there_is_named(tmp_path):
    assert run_refusal(tmp_path / "runs").startswith(f"{tmp_path}/runs: cannot be read")


def test_a_folder_without_checkpoints_is_named(tmp_path):
    assert run_refusal(tmp_path).startswith(f"{tmp_path}: holds no whole checkpoint")


def test_a_run_without_its_tokenizer_is_refused(run):
    (run / "tokenizer.json").unlink()
    assert run_refusal(run).startswith(f"{run}/tokenizer.json: cannot be read")


def test_a_run_with_another_tokenizer_is_refused(run):
    save_tokenizer(run / "tokenizer.json", [(b"a", b"b")])
    message = run_refusal(run)
    assert message.startswith(f"{run}/tokenizer.json: not the one that step_0000002.pt")


@pytest.mark.parametrize("name", ["step", "settings", "boundary", "tokenizer_sha256"])
def test_what_a_checkpoint_of_a_run_lacks_is_named(run, name):
    path = run / "step_0000002.pt"
    content = load_checkpoint(path)
    del content[name]
    torch.save(content, path)
    message = run_refusal(run)
    assert message.startswith(f"{path}: ")
    assert f"lacks '{name}'" in message
