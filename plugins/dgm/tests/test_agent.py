"""The agent's own modules: every operator leaves the tree as it found it, and examples of every shape are read."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import selfimprove_dgm
from selfimprove.tasks.bugs import KINDS, count, with_bug
from selfimprove.tasks.program_repair import functions
from selfimprove_dgm.genome import donors, initial

HERE = Path(selfimprove_dgm.__file__).parent
OPERATORS = sorted([*(HERE / "agent" / "operators").glob("*.py"), *(HERE / "donors").glob("*.py")])
SOURCES = [f.source for f in functions().values()][::8]


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"agent_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", OPERATORS, ids=lambda p: p.stem)
def test_an_operator_takes_its_edit_out_again(path: Path) -> None:
    module, made = loaded(path), 0
    for source in SOURCES:
        tree = ast.parse(source)
        for _ in module.edits(tree):
            made += ast.unparse(tree) != source
        assert ast.unparse(tree) == source
    assert made or path.stem == "stop"


@pytest.mark.parametrize("kind", KINDS)
def test_a_bug_is_taken_out_again(kind: str) -> None:
    for source in SOURCES:
        tree = ast.parse(source)
        for _ in KINDS[kind](tree):
            pass
        assert ast.unparse(tree) == source
        for number in range(min(3, count(source, kind))):
            assert with_bug(source, kind, number) != source
        with pytest.raises(IndexError):
            with_bug(source, kind, 10_000)


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        (">>> f(1, [2])\n    3", [("(1, [2])", "3")]),
        ("f('a') == 'b'", [("('a',)", "'b'")]),
        ("f(1) ➞ 2.", [("(1,)", "2.0")]),
        ("f(1) => [1, 2]", [("(1,)", "[1, 2]")]),
        ("f(1) -> None", [("(1,)", "None")]),
        ("f(1) should return True", [("(1,)", "True")]),
        ("f(1) returns (1, 2) because", [("(1,)", "(1, 2)")]),
        (">>> f(x)\n    3", []),
        (">>> f(1)\n    <object>", []),
        ("nothing", []),
    ],
)
def test_examples_of_a_docstring(text: str, pairs: list[Any]) -> None:
    module = loaded(HERE / "agent" / "examples.py")
    assert module.examples(f'def f(*a):\n    """{text}"""\n', "f", list(module.SHAPES)) == pairs


def test_the_initial_agent_knows_one_operator_and_the_pool_others() -> None:
    known = [n for n in initial() if n.startswith("operators/")]
    assert known == ["operators/comparison.py"]
    assert not {f"operators/{n}.py" for n in donors()} & set(known)
