"""config/: override files and flags, left to right, both strict. Alone: python -m pytest tests/test_config.py"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import config
import finetune
import train
from config import UserError
from train import Settings

ROOT = Path(__file__).parent.parent
FILES = sorted(path for path in (ROOT / "config").glob("*.py") if path.name != "__init__.py")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture
def file(tmp_path):
    """Writes an override file -> its path."""
    def write(text: str, name: str = "mine.py") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)
    return write


def load(*args: str) -> Settings:
    return config.load(Settings, list(args))


def refusal(*args: str) -> str:
    with pytest.raises(UserError) as error:
        load(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------ what is taken


def test_no_arguments_give_the_defaults():
    assert load() == Settings()


def test_files_and_flags_apply_left_to_right(file):
    first, second = file("lr = 1e-3\nseed = 5\n", "first.py"), file("lr = 2e-3\n", "second.py")
    assert load(first) == Settings(lr=1e-3, seed=5)
    assert load(first, second) == Settings(lr=2e-3, seed=5)
    assert load(second, first) == Settings(lr=1e-3, seed=5)
    assert load(first, "--lr=3e-3", "--seed=6") == Settings(lr=3e-3, seed=6)
    assert load("--lr=3e-3", first) == Settings(lr=1e-3, seed=5)
    assert load("--seed=1", "--seed=2") == Settings(seed=2)


@pytest.mark.parametrize("flag, name, value", [
    ("--lr=1", "lr", 1.0), ("--lr=7e-4", "lr", 7e-4), ("--dropout=0", "dropout", 0.0), ("--n_layer=3", "n_layer", 3),
    ("--out_dir=runs/a=b", "out_dir", "runs/a=b"), ("--schedule=24_1CLM:15MNTP", "schedule", "24_1CLM:15MNTP"),
    ("--tied", "tied", True), ("--tied=true", "tied", True), ("--tied=false", "tied", False),
    ("--prepare=a.py x,b.py", "prepare", ("a.py x", "b.py")), ("--prepare=", "prepare", ()),
])
def test_flags_become_the_type_of_their_setting(flag, name, value):
    result = getattr(load(flag), name)
    assert result == value and type(result) is type(value)


def test_a_whole_number_does_for_a_float_in_a_file(file):
    assert type(load(file("lr = 1\n")).lr) is float


def test_a_file_is_plain_python(file):
    path = file("import math\n_width = 64\nn_embd = 2 * _width\nn_ff = int(math.sqrt(_width)) * 4\n")
    assert load(path) == Settings(n_embd=128, n_ff=32)


def test_files_run_in_their_own_namespace(file):
    before = [dict(vars(module)) for module in (config, train)], dict(vars(Settings))
    load(file("import math as fields\n_secret = 7\nlr = _secret / 10\ncorpus = __name__\n", "first.py"))
    assert ([dict(vars(module)) for module in (config, train)], dict(vars(Settings))) == before
    assert load() == Settings()
    second = file("lr = _secret / 10\n", "second.py")
    assert "NameError" in refusal(file("_secret = 7\n", "first.py"), second)
    for name in ("sys", "Settings", "path"):  # of train.py and of config/__init__.py
        assert "NameError" in refusal(file(f"corpus = str({name})\n"))


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("text, expected", [
    ("n_layers = 3", ["'n_layers'", "did you mean 'n_layer'?"]),
    ("learning_rate = 1e-3", ["'learning_rate'", "not a setting"]),
    ("n_layer = 2.0", ["n_layer=2.0", "int", "float"]),
    ("n_layer = '2'", ["n_layer='2'", "int", "str"]),
    ("n_layer = True", ["n_layer=True", "int", "bool"]),
    ("lr = '1e-3'", ["lr='1e-3'", "float", "str"]),
    ("lr = None", ["lr=None", "float"]),
    ("lr = True", ["lr=True", "float", "bool"]),
    ("tied = 1", ["tied=1", "bool", "int"]),
    ("out_dir = 3", ["out_dir=3", "str", "int"]),
    ("prepare = ['a.py']", ["prepare=['a.py']", "tuple", "list"]),
    ("lr = 1e-3\nn_layer = = 2", [":2: not valid Python"]),
    ("def (", [":1: not valid Python"]),
    ("lr = 1 / 0", ["ZeroDivisionError"]),
    ("import no_such_package", ["ModuleNotFoundError", "no_such_package"]),
    ("n_head = 7", ["n_head", "512 / 7"]),
    ("n_layer = -1", ["n_layer", "-1"]),
    ("dropout = 1.0", ["dropout", "1.0"]),
    ("schedule = '4_CML'", ["schedule", "'4_CML'", "'CML'"]),
    ("n_layer = 10 ** 4000", ["n_layer", "64 bits"]),
    ("lr = 10 ** 4000", ["lr", "64 bits"]),
    ("lr = 10 ** 5000", ["ValueError", "4300 digits"]),
    ("seed = -2 ** 63", ["seed", "64 bits"]),
    ("out_dir = 'a\\nb'", ["out_dir", "control", r"'a\nb'"]),
    ("corpus = 'a\\0b'", ["corpus", "control"]),
    ("score = '\\ud800'", ["score", "control"]),
    ("prepare = (1, 2)", ["prepare", "text", "1"]),
    ("prepare = ('a.py', 'b\\0.py')", ["prepare", "control"]),
    ("n_embd = 512\0", ["null bytes"]),
    ("class lr:\n    def __repr__(self): 1 / 0\nlr = lr()", ["ZeroDivisionError"]),
    ("schedule = '" + "9" * 5000 + "_CLM'", ["schedule", "epochs"]),
    ("schedule = '1_" + "9" * 5000 + "CLM'", ["schedule", "weight"]),
])
def test_a_bad_file_is_named(file, text, expected):
    path = file(text + "\n")
    line = refusal("--seed=3", path)
    assert line.startswith(path)
    assert all(part in line for part in expected), line


@pytest.mark.parametrize("flag, expected", [
    ("--n_layers=3", ["did you mean 'n_layer'?"]), ("--LR=1", ["'LR'", "not a setting"]), ("--help", ["not a setting"]),
    ("--", ["not a setting"]), ("--lr", ["--lr=VALUE", "float"]), ("--lr=fast", ["'fast'", "float"]),
    ("--lr=", ["float"]), ("--n_layer=2.0", ["'2.0'", "int"]), ("--tied=True", ["--tied=true"]),
    ("--tied=", ["--tied=true"]), ("--resume=1", ["--resume=true"]), ("--lr=0", ["lr = 0.0", "greater than 0"]),
    ("--lr=nan", ["lr", "nan"]), ("--batch_rows=0", ["batch_rows 0", "at least 1"]),
    ("--micro_rows=-4", ["micro_rows", "-4"]), ("--seed=-1", ["seed", "-1", "negative"]),
    ("--warmup=1", ["warmup", "1.0"]), ("--lr_min_ratio=2", ["lr_min_ratio", "2.0"]), ("--mask_span=0.5", ["mask_span", "0.5"]),
    ("--block_size=1", ["block_size = 1", "at least 2"]), ("--keep=0", ["keep = 0", "greater than 0"]),
    ("--backbone=gpt2", ["backbone", "'gpt2'", "babyllama, ltg_bert"]),
    ("--optimizer=adam", ["optimizer", "'adam'", "adamw, lamb, muon"]),
    ("--lr_decay=exp", ["lr_decay", "'exp'", "cosine, linear, constant"]), ("--device=tpu", ["device", "'tpu'"]),
    ("--precision=float16", ["precision", "'float16'"]), ("--compile=yes", ["compile", "'yes'"]),
    ("--schedule=4_GPT", ["'4_GPT'", "'GPT'", "CLM, MLM, MNTP"]), ("--schedule=", ["EPOCHS_MIX"]),
    ("--mask_start=0.005", ["mask_start", "0.005", "128"]), ("--mask_end=1", ["mask_end", "1.0"]),
    ("--n_head=3", ["n_head", "512 / 3"]), ("--n_bucket=0", ["n_bucket", "0"]),
    ("--n_layer=" + "9" * 30, ["64 bits"]), ("--seed=" + "9" * 5000, ["int"]), ("--out_dir=a\nb", ["control"]),
    ("--out_dir=\udcff", ["control"]), ("--a\nb=1", [r"--a\nb", "not a setting"]),
])
def test_a_bad_flag_is_named(flag, expected):
    line = refusal("--seed=3", flag)
    assert line.startswith(flag.partition("=")[0].replace("\n", r"\n"))
    assert all(part in line for part in expected), line


def test_combinations_that_cannot_be(file, monkeypatch):
    ltg = file("backbone = 'ltg_bert'\n")
    assert "n_bucket" in refusal(ltg, "--n_bucket=1")
    assert "n_bucket" in refusal(ltg, "--n_bucket=32", "--max_position=32")
    line = refusal("--schedule=2_1CLM:15MNTP", "--batch_rows=8")
    assert line.startswith("--batch_rows") and "8" in line and "2_1CLM:15MNTP" in line and "16" in line
    assert load("--schedule=2_CLM", "--mask_start=0").mask_start == 0  # CLM hides nothing
    monkeypatch.setenv("WORLD_SIZE", "3")
    line = refusal("--batch_rows=256")
    assert line.startswith("--batch_rows") and "256" in line and "3 processes" in line
    assert load("--batch_rows=255").batch_rows == 255


def test_the_last_origin_is_named(file):
    path = file("n_head = 7\n")
    assert refusal("--n_head=5", path).startswith(path)
    assert refusal(path, "--n_head=5").startswith("--n_head")
    assert load(path, "--n_head=8").n_head == 8  # what counts is the result


@pytest.mark.parametrize("path", ["config/babylama.py", "-h", "lr=1e-3"])
def test_a_missing_file_is_named(path):
    line = refusal(path)
    assert line.startswith(path) and "No such file" in line and "config/quickstart.py" in line


# ------------------------------------------------------------------------------------------ the files that ship


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_files_load_and_are_short(path):
    settings = load(str(path))
    assert settings != Settings()
    assert settings.out_dir == f"runs/{path.stem}"
    assert len(path.read_text().splitlines()) <= 25


def test_the_published_schedule_ships():
    assert "babyllama" in [path.stem for path in FILES]
    assert load(str(ROOT / "config" / "babyllama.py")).schedule == "4_CLM+16_MLM+4_CLM"


@pytest.mark.parametrize("args, world, expected", [
    (["mine.py", "--n_layers=3"], "1", "--n_layers=3: 'n_layers' is not a setting; did you mean 'n_layer'?"),
    (["mine.py"], "3", "mine.py: batch_rows = 64 must be a multiple of the 3 processes"),
], ids=["unknown flag", "3 processes"])
def test_a_mistake_ends_train_py_with_one_line(file, tmp_path, args, world, expected):
    path = Path(file("batch_rows = 64\n"))
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *args], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"WORLD_SIZE": world})
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"train.py: {expected}\n")
    assert list(tmp_path.iterdir()) == [path]  # nothing was started


def test_the_settings_of_finetune_load():
    assert config.load(finetune.Settings, [str(ROOT / "config/finetune/glue_lora.py")]).lora_rank == 8
