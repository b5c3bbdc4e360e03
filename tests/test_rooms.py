"""Imports run down only, and the text keeps to the taste rules that a machine can see."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("*.py", "antlm/*.py", "babylm/*.py", "tools/*.py", "tests/*.py", "config/**/*.py")
FILES = []
for folder in FOLDERS:
    FILES += sorted(path.relative_to(ROOT) for path in ROOT.glob(folder))
PROGRAMS = {"train", "eval", "finetune", "sample", "prepare"}

# What each file of ours may import of ours. tools/ and tests/ may import anything.
ALLOWED = {
    "config": set(),
    "schedule": {"config"},
    "antlm": set(),
    "antlm.files": set(),
    "antlm.program": {"config"},
    "antlm.texts": {"config"},
    "antlm.tokenizer": {"antlm.files", "config"},
    "antlm.workers": {"config"},
    "antlm.ops": {"antlm"},
    "antlm.optim": set(),
    "antlm.distributed": {"antlm.program", "config"},
    "antlm.compiling": {"antlm.distributed", "config"},
    "model": {"antlm", "antlm.ops", "config"},
    "data": {"antlm", "antlm.tokenizer", "schedule", "config"},
    "antlm.checkpoint": {"antlm.files", "antlm.tokenizer", "antlm.distributed", "model", "config"},
    "antlm.metrics": {"antlm.checkpoint", "config"},
}
FOUNDATION = {*ALLOWED}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path) for path in FILES}


def imports_of_ours(path: Path) -> set[str]:
    """Modules of this project that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in MODULES else node.module)
    return names & MODULES


def allowed(module: str) -> set[str]:
    if module in PROGRAMS:
        babylm = {name for name in MODULES if name.startswith("babylm")}
        return FOUNDATION | babylm
    if module.startswith("babylm"):
        babylm = {name for name in MODULES if name.startswith("babylm")}
        return FOUNDATION | babylm
    return ALLOWED[module]


SOURCES = [path for path in FILES if path.parts[0] not in ("tests", "tools")]
ROOMS = [path for path in SOURCES if path.parts[0] != "config" or path.name == "__init__.py"]


@pytest.mark.parametrize("path", ROOMS, ids=str)
def test_imports_run_down_only(path):
    extra = imports_of_ours(path) - allowed(module_name(path))
    assert not extra, f"{path} must not import {', '.join(sorted(extra))}"


@pytest.mark.slow
def test_importing_any_file_starts_nothing():
    names = ", ".join(sorted(module_name(path) for path in ROOMS))
    done = subprocess.run(
        [sys.executable, "-c", f"import {names}"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ------------------------------------------------------------------------------------------- taste


def is_unrelated_tuple(node: ast.AST) -> bool:
    """`a, b = x, y`, which is two statements in a line; a swap is fine."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    target = node.targets[0]
    if not isinstance(target, ast.Tuple):
        return False
    left = {ast.unparse(element) for element in target.elts}
    right = {ast.unparse(element) for element in node.value.elts}
    return left != right


def is_text_times_condition(node: ast.AST) -> bool:
    """`"..." * (n > 0)`, which is an if."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult):
        return False
    sides = (node.left, node.right)
    return any(isinstance(side, ast.Compare | ast.BoolOp) for side in sides) and any(
        isinstance(side, ast.Constant | ast.JoinedStr | ast.List) for side in sides
    )


def is_loop_over_choice(node: ast.AST) -> bool:
    """`for x in A if condition else B`, which is an if around a loop."""
    return isinstance(node, ast.For | ast.comprehension) and isinstance(node.iter, ast.IfExp)


def is_nested_choice(node: ast.AST) -> bool:
    if not isinstance(node, ast.IfExp):
        return False
    return any(isinstance(part, ast.IfExp) for part in (node.body, node.test, node.orelse))


def is_choice_as_statement(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.IfExp)


def has_two_loops(node: ast.AST) -> bool:
    return hasattr(node, "generators") and len(node.generators) > 1


def is_hidden_walrus(node: ast.AST) -> bool:
    """A walrus that is not the whole test of an if or while, nor compared in it."""
    if isinstance(node, ast.If | ast.While):
        return False
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.NamedExpr) and not isinstance(node, ast.Compare):
            return True
    return False


RULES = [
    is_unrelated_tuple,
    is_text_times_condition,
    is_loop_over_choice,
    is_nested_choice,
    is_choice_as_statement,
    has_two_loops,
    is_hidden_walrus,
]
PRONOUNS = {"found", "own", "ours", "theirs", "its", "what", "where", "whole", "these"}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_file_holds_a_construction_that_hides_a_statement(rule):
    places = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            if rule(node):
                places.append(f"{path}:{getattr(node, 'lineno', '?')}")
    assert not places


def test_no_closure_writes_outside():
    places = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Nonlocal):
                places.append(f"{path}:{node.lineno}")
    assert not places


def test_functions_fit_on_a_screen():
    """60 lines; the loop in train.py, which is meant to be read from top to bottom, has 130."""
    longest = {"train.train": 130}
    long = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                name = f"{module_name(path)}.{node.name}"
                if lines > longest.get(name, 60):
                    long.append(f"{name}: {lines} lines")
    assert not long


def test_names_are_not_pronouns():
    places = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            name = getattr(node, "arg", None)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                name = node.id
            if isinstance(node, ast.FunctionDef):
                name = node.name
            if name in PRONOUNS:
                places.append(f"{path}:{node.lineno} {name}")
    assert not places
