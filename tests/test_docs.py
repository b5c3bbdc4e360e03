"""README.md and docs/: every command, link and file that they name exists.

python -m pytest tests/test_docs.py

Each command is run up to the point where the program has read its arguments: the program's own
parser then has accepted every flag, setting and choice. Nothing is trained or downloaded.
"""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

import config
import data
from schedule import parse

ROOT = Path(__file__).parent.parent
# docs/forks.md names settings that its patches bring; test_forks.py applies them
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES_WITH_COMMANDS = [page for page in PAGES if page.name != "forks.md"]
# what some programs need beside requirements.txt
OPTIONAL = {"transformers", "tokenizers", "safetensors", "matplotlib"}


class ArgumentsRead(BaseException):
    """Raised in place of all that a program does once it has read its arguments."""


def shell_text(path: Path) -> str:
    """Return the shell commands of a page, or all of a script.

    On a page they stand in blocks fenced as sh, or in a line as `python ...`.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".sh":
        return text
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`(python [^`\n]+)`", text)
    return "\n".join(blocks + inline)


def split_heredocs(text: str) -> tuple[str, dict[str, str]]:
    """Take the files that `cat > NAME <<'END'` writes out of shell text: the rest, {name: text}."""
    pattern = r"^cat > (\S+) <<'END'\n(.*?)^END\n"
    files = dict(re.findall(pattern, text, re.DOTALL | re.MULTILINE))
    return re.sub(pattern, "", text, flags=re.DOTALL | re.MULTILINE), files


def split_commands(text: str) -> list[list[str]]:
    """Return the words of each simple command in shell text, without variables set in front."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|"):
                commands.append(words)
                words = []
            elif words or not re.fullmatch(r"[A-Z_]+=.*", word):
                words.append(word)
    return [words for words in commands if words]


def python_arguments(words: list[str]) -> list[str]:
    """Return what follows `python` in a command; of torchrun the program and its arguments."""
    if words[0] == "torchrun":
        program = next(i for i, word in enumerate(words) if word.endswith(".py"))
        return words[program:]
    return words[1:]


def commands_of_pages() -> list:
    """Return a case for each different python and torchrun command: its arguments, and files."""
    cases = {}
    for page in [*PAGES_WITH_COMMANDS, ROOT / "quickstart.sh"]:
        text, files = split_heredocs(shell_text(page))
        for words in split_commands(text):
            if words[0] in ("python", "torchrun"):
                arguments = python_arguments(words)
                name = shlex.join(arguments)
                cases[name] = pytest.param(arguments, files, id=f"{page.name}: {name}")
    return list(cases.values())


@pytest.fixture
def stop_once_arguments_are_read(monkeypatch):
    """Make argparse and config.load raise ArgumentsRead after their work."""
    parse_args = argparse.ArgumentParser.parse_args
    load = config.load

    def parse_and_stop(parser, args=None, namespace=None):
        parse_args(parser, args, namespace)
        raise ArgumentsRead

    def load_and_stop(cls, args):
        # the spec of an experiment loads settings of train.py to check its arms
        settings = load(cls, args)
        if cls.__module__ != "__main__":
            return settings
        raise ArgumentsRead

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(config, "load", load_and_stop)


@pytest.mark.parametrize("arguments, files", commands_of_pages())
def test_a_command_is_one_that_its_program_takes(
    arguments, files, tmp_path, monkeypatch, stop_once_arguments_are_read
):
    if arguments[:2] == ["-m", "pytest"]:
        return  # this very program

    # where the reader stands: the project's folder, and the files that the page has written there
    monkeypatch.chdir(ROOT)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    arguments = [str(tmp_path / word) if word in files else word for word in arguments]

    # run it as python would
    if arguments[0] == "-m":
        monkeypatch.setattr(sys, "argv", arguments[1:])
        run = runpy.run_module
        program = arguments[1]
    else:
        monkeypatch.setattr(sys, "argv", arguments)
        run = runpy.run_path
        program = arguments[0]
        assert (ROOT / program).is_file()
    monkeypatch.syspath_prepend(str((ROOT / program).parent))
    try:
        with pytest.raises(ArgumentsRead):
            run(program, run_name="__main__")
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"{program} needs {error.name}")


def test_the_pages_have_commands():
    assert len(commands_of_pages()) >= 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_exists(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


def test_the_readme_lists_every_program_and_folder():
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"^## Files\n+```text\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)[1]
    listed = set(re.findall(r"^([\w./]+)  +\S", block, re.MULTILINE))
    # a program has a docstring; a file without one is a user's settings
    programs = {path.name for path in ROOT.glob("*.py") if path.read_text().startswith('"""')}
    assert programs <= listed
    folders = {f"{path.parent.relative_to(ROOT)}/" for path in ROOT.glob("*/*.py")}
    assert {folder for folder in folders if not folder.startswith((".", "runs"))} <= listed
    for name in listed:
        assert (ROOT / name).exists(), name


def test_the_objective_of_the_readme_makes_batches():
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)[1]
    namespace = vars(data) | {"OBJECTIVES": dict(data.OBJECTIVES)}
    exec(block, namespace)
    name = (namespace["OBJECTIVES"].keys() - data.OBJECTIVES.keys()).pop()
    (phase,) = parse(f"2_{name}")  # the grammar takes the name
    assert phase.objectives == [name]

    # a row of 8 tokens, and the one after each
    tokens = np.arange(10, 18)[None]
    inside = np.ones((1, 8), bool)
    zero = np.zeros(1, np.int64)
    rows = data.Rows(tokens, tokens + 1, inside, zero[:, None], zero, seed=1, epoch=0, step=0)
    hiding = data.Hiding(rate=0.0, span=1.0, slots=0, vocab_size=32)
    batch = namespace["OBJECTIVES"][name].build(rows, hiding)
    assert batch.targets.tolist() == [[data.IGNORE] * 4 + [15, 16, 17, 18]]
