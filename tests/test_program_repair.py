"""Program repair: every bug is caught by its hidden test and no function is, hidden tests are literals, and splits stay apart."""

from __future__ import annotations

import ast
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfimprove.errors import ConfigError
from selfimprove.sandbox import Sandbox
from selfimprove.sandbox.calls import called
from selfimprove.task import SPLITS
from selfimprove.tasks.bugs import with_bug
from selfimprove.tasks.program_repair import INDEX, ProgramRepair, cases, decode, encode, equal, functions, literal
from selfimprove.tasks.program_repair_index import fails
from selfimprove.testing import TaskContract

BUGS = json.loads(INDEX.read_text())["bugs"]
LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


class TestContract(TaskContract):
    def make_plugin(self) -> ProgramRepair:
        return ProgramRepair(8, 4, 6)


def test_every_function_has_a_bug_and_a_test_of_literals() -> None:
    known = functions()
    for name, (kind, number) in BUGS.items():
        broken = with_bug(known[name].source, kind, number)
        assert broken != known[name].source
        hidden = cases(known[name])
        assert len(hidden) >= 3
        assert decode(encode(hidden)) == hidden
        for case in hidden:
            assert isinstance(ast.literal_eval(case.arguments), tuple)
            assert case.right(ast.literal_eval(case.result))


def test_an_item_shows_the_function_and_not_its_test() -> None:
    task = ProgramRepair()
    for split in SPLITS:
        hidden = task.answers(split)
        for item in task.items(split):
            assert f"def {item.title}(" in item.context
            assert "candidate(" not in item.context
            assert hidden[item.id][0] not in item.context


def test_the_same_test_is_recorded_again() -> None:
    """Some tests of the package draw their calls."""
    for name in ("HumanEval/53", "HumanEval/32", "HumanEval/38"):
        assert cases(functions()[name]) == cases(functions()[name])


@given(LITERALS)
def test_a_literal_is_equal_to_itself(value: object) -> None:
    text = literal(value)
    assert text is not None
    assert equal(value, ast.literal_eval(text))


@pytest.mark.parametrize(
    ("wanted", "got", "same"),
    [
        (1.0, 1.0 + 1e-9, True),
        (1.0, 1.1, False),
        (math.nan, math.nan, False),
        (1.0, "1.0", False),
        ([1.0, (2,)], [1.0, (2,)], True),
        ([1], (1,), False),
        ([1], [1, 2], False),
        ("", None, False),
        (None, None, True),
        (True, 1, True),
    ],
)
def test_equal(wanted: object, got: object, same: bool) -> None:
    assert equal(wanted, got) is same


def test_what_is_no_literal_is_left_out() -> None:
    assert literal(object()) is None
    assert literal("x" * 10_000) is None


@settings(max_examples=10)
@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_no_seed_trains_or_validates_on_what_another_seals(one: int, other: int) -> None:
    tasks = [ProgramRepair(60, 30, 50, seed) for seed in (one, other)]
    sealed = {i.id for i in tasks[0].items("test")}
    assert len(sealed) == 50
    assert sealed == {i.id for i in tasks[1].items("test")}
    assert not sealed & {i.id for split in ("train", "validation") for i in tasks[1].items(split)}


@pytest.mark.parametrize("sizes", [(0, 1, 1), (100, 50, 50)])
def test_sizes_that_do_not_fit_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="together"):
        ProgramRepair(*sizes)


def test_calls_that_break_are_data() -> None:
    sandbox = Sandbox("auto")
    source = """
class Liar:
    def __repr__(self): return "__import__('os')"
def f(x):
    if x == 0: return 1 / 0
    if x == 1: raise SystemExit
    if x == 2: return Liar()
    if x == 3: return [x]
    while True: pass
"""
    found = called(sandbox, source, "f", ["(0,)", "(1,)", "(2,)", "(3,)", "(4,)", "(3,)"])
    assert [r.error for r in found] == ["ZeroDivisionError", "SystemExit", "it returned no literal", None, "TooLong", "TooLong"]
    assert found[3].value == [3]
    assert called(sandbox, "import os; os._exit(0)", "f", ["()"])[0].error
    assert called(sandbox, "def g(): pass", "f", ["()"])[0].error == "KeyError"
    assert called(sandbox, source, "f", []) == []
    forged = 'import os, json\nos.write(3, b\'{"call": "answer", "value": [1, 2]}\\n\')\nos._exit(0)'
    assert called(sandbox, forged, "f", ["()"])[0].error == "it ended without an answer" or called(sandbox, forged, "f", ["()"])[0].error


@pytest.mark.slow
def test_hidden_tests_pass_the_function_and_catch_the_bug() -> None:
    sandbox, known = Sandbox("auto"), functions()
    for name, (kind, number) in BUGS.items():
        hidden = cases(known[name])
        assert not fails(sandbox, known[name].source, known[name], hidden), name
        assert fails(sandbox, with_bug(known[name].source, kind, number), known[name], hidden), name
