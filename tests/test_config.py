"""config/: override files and flags, left to right, both strict.

Alone: python -m pytest tests/test_config.py
"""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import config
import finetune
import train
from config import UserError
from train import Settings

ROOT = Path(__file__).parent.parent
FILES = sorted(path for path in (ROOT / "config").glob("*.py") if path.name != "__init__.py")


@pytest.fixture
def file(tmp_path):
    """A function that writes an override file and returns its path."""

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


# ----------------------------------------------------------------------------------- what is taken


def test_no_arguments_give_the_defaults():
    assert load() == Settings()


def test_files_and_flags_apply_left_to_right(file):
    first = file("lr = 1e-3\nseed = 5\n", "first.py")
    second = file("lr = 2e-3\n", "second.py")
    assert load(first) == Settings(lr=1e-3, seed=5)
    assert load(first, second) == Settings(lr=2e-3, seed=5)
    assert load(second, first) == Settings(lr=1e-3, seed=5)
    assert load(first, "--lr=3e-3", "--seed=6") == Settings(lr=3e-3, seed=6)
    assert load("--lr=3e-3", first) == Settings(lr=1e-3, seed=5)
    assert load("--seed=1", "--seed=2") == Settings(seed=2)


@pytest.mark.parametrize(
    "flags, name, value",
    [
        (["--lr=1"], "lr", 1.0),
        (["--lr", "7e-4"], "lr", 7e-4),
        (["--dropout=0"], "dropout", 0.0),
        (["--n_layer", "3", "--seed=2"], "n_layer", 3),
        (["--out_dir=runs/a=b"], "out_dir", "runs/a=b"),
        (["--schedule=24_1CLM:15MNTP"], "schedule", "24_1CLM:15MNTP"),
        (["--tied"], "tied", True),
        (["--tied=true"], "tied", True),
        (["--tied", "false"], "tied", False),
        (["--tied", "--seed=3"], "tied", True),
    ],
)
def test_flags_become_the_type_of_their_setting(flags, name, value):
    result = getattr(load(*flags), name)
    assert result == value
    assert type(result) is type(value)


def test_a_flag_of_several_values_is_cut_at_commas():
    settings = config.load(finetune.Settings, ["--tasks=rte,wsc", "--seeds", "1,2"])
    assert settings.tasks == ("rte", "wsc")
    assert settings.seeds == ("1", "2")


def test_a_whole_number_does_for_a_float_in_a_file(file):
    assert type(load(file("lr = 1\n")).lr) is float


def test_a_file_is_plain_python(file):
    path = file(
        "import math\n_width = 64\nn_embd = 2 * _width\nn_ff = int(math.sqrt(_width)) * 4\n"
    )
    assert load(path) == Settings(n_embd=128, n_ff=32)


def test_files_run_in_their_own_namespace(file):
    before = [dict(vars(module)) for module in (config, train)]
    load(file("_secret = 7\nlr = _secret / 10\ncorpus = __name__\n", "first.py"))
    assert [dict(vars(module)) for module in (config, train)] == before
    assert load() == Settings()
    assert "NameError" in refusal(file("lr = _secret / 10\n", "second.py"))
    for name in ("sys", "Settings", "path"):  # of train.py and of config/__init__.py
        assert "NameError" in refusal(file(f"corpus = str({name})\n"))


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "text, expected",
    [
        ("n_layers = 3", ["'n_layers'", "did you mean 'n_layer'?"]),
        ("learning_rate = 1e-3", ["'learning_rate'", "not a setting"]),
        ("n_layer = 2.0", ["n_layer = 2.0", "int", "float"]),
        ("n_layer = True", ["n_layer = True", "int", "bool"]),
        ("lr = '1e-3'", ["lr = '1e-3'", "float", "str"]),
        ("lr = None", ["lr = None", "float"]),
        ("tied = 1", ["tied = 1", "bool", "int"]),
        ("out_dir = 3", ["out_dir = 3", "str", "int"]),
        ("lr = 1e-3\nn_layer = = 2", [":2: not valid Python"]),
        ("def (", [":1: not valid Python"]),
        ("lr = 1 / 0", ["ZeroDivisionError"]),
        ("import no_such_package", ["ModuleNotFoundError", "no_such_package"]),
        ("n_head = 7", ["n_head", "512", "7"]),
        ("n_layer = -1", ["n_layer", "-1"]),
        ("dropout = 1.0", ["dropout", "1.0"]),
        ("schedule = '4_CML'", ["schedule", "'4_CML'", "'CML'"]),
    ],
)
def test_a_bad_file_is_named(file, text, expected):
    path = file(text + "\n")
    line = refusal("--seed=3", path)
    assert line.startswith(path)
    for part in expected:
        assert part in line


@pytest.mark.parametrize(
    "flag, expected",
    [
        ("--n_layers=3", ["did you mean 'n_layer'?"]),
        ("--LR=1", ["'LR'", "not a setting"]),
        ("--", ["not a setting"]),
        ("--lr", ["float"]),
        ("--lr=fast", ["fast", "float"]),
        ("--lr=", ["float"]),
        ("--n_layer=2.0", ["2.0", "int"]),
        ("--tied=True", ["true or false"]),
        ("--lr=0", ["lr = 0.0", "greater than 0"]),
        ("--lr=nan", ["lr", "nan"]),
        ("--clip=inf", ["clip", "inf"]),
        ("--out_dir=", ["out_dir", "empty"]),
        ("--batch_rows=0", ["batch_rows = 0", "at least 1"]),
        ("--micro_rows=-4", ["micro_rows = -4"]),
        ("--seed=-1", ["seed = -1", "negative"]),
        ("--warmup=1", ["warmup = 1.0"]),
        ("--lr_min_ratio=2", ["lr_min_ratio = 2.0"]),
        ("--mask_span=0.5", ["mask_span = 0.5"]),
        ("--eval_mask_rate=0", ["eval_mask_rate = 0.0"]),
        ("--block_size=1", ["block_size = 1", "at least 2"]),
        ("--keep=0", ["keep = 0", "at least 1"]),
        ("--backbone=gpt2", ["'gpt2'", "babyllama, ltg_bert"]),
        ("--optimizer=adam", ["'adam'", "adamw, lamb, muon"]),
        ("--lr_decay=exp", ["'exp'", "cosine, linear, constant"]),
        ("--device=tpu", ["'tpu'", "auto, cpu, cuda, mps"]),
        ("--precision=float16", ["'float16'"]),
        ("--compile=yes", ["'yes'"]),
        ("--schedule=4_GPT", ["'4_GPT'", "'GPT'", "CLM, MLM, MNTP"]),
        ("--schedule=4-CLM", ["EPOCHS_MIX"]),
        ("--mask_start=0.005", ["mask_start = 0.005", "128"]),
        ("--mask_end=1", ["mask_end = 1.0"]),
        ("--n_head=3", ["n_head = 3", "512"]),
        ("--log_every=0", ["log_every = 0", "at least 1"]),
        ("--eval_rows=0", ["eval_rows = 0", "at least 1"]),
        ("--save_every=0", ["save_every = 0", "at least 1"]),
        ("--seed=9223372036854775808", ["seed = 9223372036854775808", "2**63"]),
        ("--weight_decay=-0.1", ["weight_decay = -0.1", "negative"]),
        ("--clip=-1", ["clip = -1.0", "negative"]),
        ("--skip_nonfinite=-1", ["skip_nonfinite = -1", "negative"]),
        ("--eval_every=-1", ["eval_every = -1", "negative"]),
        ("--beta1=1", ["beta1 = 1.0", "[0, 1)"]),
        ("--beta2=-0.1", ["beta2 = -0.1", "[0, 1)"]),
        ("--average_share=1.5", ["average_share = 1.5", "[0, 1]"]),
        ("--lr_decay_share=0", ["lr_decay_share = 0.0", "(0, 1]"]),
        ("--eps=0", ["eps = 0.0", "greater than 0"]),
        ("--mask_decay=constant", ["'constant'", "linear, cosine"]),
    ],
)
def test_a_bad_flag_is_named(flag, expected):
    line = refusal("--seed=3", flag)
    assert line.startswith(flag.partition("=")[0])
    for part in expected:
        assert part in line


def test_combinations_that_cannot_be(file):
    ltg_bert = file("backbone = 'ltg_bert'\n")
    assert "n_bucket" in refusal(ltg_bert, "--n_bucket=1")
    assert "n_bucket" in refusal(ltg_bert, "--n_bucket=32", "--max_position=32")
    assert load("--n_bucket=1").n_bucket == 1  # BabyLlama has no buckets
    line = refusal("--schedule=2_1CLM:15MNTP", "--batch_rows=8")
    assert line.startswith("--batch_rows: batch_rows = 8 ")
    assert "2_1CLM:15MNTP" in line
    assert "16" in line
    assert load("--schedule=2_CLM", "--mask_start=0").mask_start == 0  # CLM hides nothing


def test_babylm_rules_allow_ten_epochs():
    line = refusal("config/babyllama.py", "--babylm_rules")
    assert "'4_CLM+16_MLM+4_CLM' has more than the 10 epochs that babylm_rules allow" in line
    assert load("--schedule=2_CLM+6_MLM+2_CLM", "--babylm_rules").babylm_rules


def test_the_last_origin_is_named(file):
    path = file("n_head = 7\n")
    assert refusal("--n_head=5", path).startswith(path)
    assert refusal(path, "--n_head=5").startswith("--n_head")
    assert load(path, "--n_head=8").n_head == 8  # only the result counts


@pytest.mark.parametrize("path", ["config/babylama.py", "lr=1e-3"])
def test_a_missing_file_is_named(path):
    line = refusal(path)
    assert line.startswith(path)
    assert "No such file" in line
    assert "config/quickstart.py" in line


# ------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("program", [train, finetune])
def test_help_lists_every_setting_with_default_and_comment(program, capsys):
    with pytest.raises(SystemExit) as end:
        config.load(program.Settings, ["--seed=1", "--help"])
    assert not end.value.code
    text = capsys.readouterr().out
    assert program.__doc__.splitlines()[0] in text
    for field in fields(program.Settings):
        line = re.search(rf"^  --{field.name}=(.*)$", text, re.M)
        assert line, field.name
        if field.type in (int, float):
            assert float(line[1].split()[0]) == field.default
    assert re.search(r"--lr=.*peak", text)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train", "eval", "finetune", "sample", "prepare"])
def test_every_program_has_help(program):
    done = subprocess.run(
        [sys.executable, f"{program}.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "--device" in done.stdout or "--vocab_size" in done.stdout


# ------------------------------------------------------------------------------ the files that ship


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_files_load_and_are_short(path):
    settings = load(str(path))
    assert settings != Settings()
    assert settings.out_dir == f"runs/{path.stem}"
    assert len(path.read_text().splitlines()) <= 36


def test_the_published_schedule_ships():
    assert load(str(ROOT / "config/babyllama.py")).schedule == "4_CLM+16_MLM+4_CLM"


@pytest.mark.slow
@pytest.mark.parametrize(
    "args, expected",
    [
        (["mine.py", "--n_layers=3"], "--n_layers=3: 'n_layers' is not a setting; "),
        (["mine.py"], "mine.py: n_embd = 33 must be a multiple of n_head = 8"),
        (["--corpus=nowhere"], "nowhere: "),
    ],
    ids=["unknown flag", "value that does not fit", "no corpus"],
)
def test_a_mistake_ends_train_py_with_one_line(file, tmp_path, args, expected):
    path = Path(file("n_embd = 33\n"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *args],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"train.py: {expected}")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]  # nothing was started


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_missing_corpus_is_answered_with_the_command_that_makes_it(path, tmp_path):
    settings = load(str(path), f"--corpus={tmp_path}/none")
    with pytest.raises(UserError) as error:
        train.open_corpus(settings)
    assert str(error.value).endswith(f"make it with: {settings.corpus_command}")
    if path.stem != "quickstart":
        prepare = r"python prepare.py babylm_100?M --dev babylm_dev "
        assert re.match(prepare, settings.corpus_command)
        assert settings.corpus_command.endswith(f" --out {load(str(path)).corpus}")
