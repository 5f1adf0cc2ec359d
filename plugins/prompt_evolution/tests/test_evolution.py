"""The frontier by hand and by law; the contract of every role; a run in which instructions really get better."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove import testing
from selfimprove.errors import AdmissionError, ConfigError
from selfimprove.models import Document, Generate
from selfimprove.session import Session
from selfimprove.testing import ScriptedEngine, toy_session
from selfimprove_prompt_evolution import Accept, Gain, Pareto, PromptAccuracy, Reflection, evolution, frontier

MAGIC = "look closely"


def answer(request: Generate, known: tuple[Document, ...]) -> str:
    """A model that is right where its instruction holds the magic words, and finds them where it is shown a failure."""
    if "FAILURES" in request.prompt:
        return f"Please {MAGIC} {request.seed % 3}" if request.seed % 2 else "Try harder"
    question = request.prompt.rpartition("|")[2]
    return testing.ToyTask().facts[question] if MAGIC in request.prompt else "unknown"


def reflection(**changes: Any) -> Reflection:
    asking: Any = {"template": "{instruction}|{question}", "max_tokens": 8}
    return Reflection("Answer.", "{instruction} FAILURES {failures} BEST {history}", asking, **{"minibatch": 2, "edits": 3, **changes})


def roles(**changes: Any) -> dict[str, Any]:
    everything = {"selector": Pareto(), "editor": reflection(), "rewarder": Gain(), "updater": Accept(), "evaluator": PromptAccuracy()}
    return {**everything, **changes}


def session(folder: Path, rounds: int = 3, **changes: Any) -> Session:
    return toy_session(folder, rounds=rounds, engine=ScriptedEngine(answer, name="magic"), **roles(**changes))


# ---- the frontier ----


def test_a_frontier_by_hand() -> None:
    values = {"a": {"1": 1.0, "2": 0.0, "3": 0.0}, "b": {"1": 0.0, "2": 1.0, "3": 1.0}, "c": {"1": 0.0, "2": 1.0, "3": 0.0}}
    assert frontier(values) == {"a": 1, "b": 2}, "c is dominated by b"
    assert frontier({}) == {}


@given(st.lists(st.lists(st.integers(0, 2).map(float), min_size=3, max_size=3), min_size=1, max_size=6))
def test_a_frontier_holds_the_best_of_every_item(rows: list[list[float]]) -> None:
    values = {str(i): dict(zip("xyz", row, strict=True)) for i, row in enumerate(rows)}
    front = frontier(values)
    for item in "xyz":
        best = max(v[item] for v in values.values())
        assert any(values[i][item] == best for i in front)
    assert max(values, key=lambda i: sum(values[i].values())) in front or any(sum(values[i].values()) == max(map(sum, rows)) for i in front)


# ---- roles ----


class _Contract:
    order_free = True

    def make_session(self, folder: Path) -> Session:
        return session(folder)


class TestEditor(_Contract, testing.EditorContract):
    def make_plugin(self) -> Reflection:
        return reflection()


class TestRewarder(_Contract, testing.RewarderContract):
    def make_plugin(self) -> Gain:
        return Gain()


class TestUpdater(_Contract, testing.UpdaterContract):
    def make_plugin(self) -> Accept:
        return Accept()

    def test_the_next_round_makes_other_children(self, tmp_path: Path) -> None:
        """It makes no candidates: it takes those of the trials, which the editor salts with the round."""


class TestSelector(_Contract, testing.SelectorContract):
    def make_plugin(self) -> Pareto:
        return Pareto()


class TestEvaluator(_Contract, testing.EvaluatorContract):
    def make_plugin(self) -> PromptAccuracy:
        return PromptAccuracy()


class TestStrategy(testing.StrategyConformance):
    strategy = "prompt_evolution"


# ---- behaviour ----


def test_instructions_get_better_and_the_weights_stay(tmp_path: Path) -> None:
    lineage = session(tmp_path).improve()
    best = lineage.best()
    assert best is not None
    assert (lineage.score(lineage.root.id), lineage.score(best.id)) == (0.0, 1.0)
    assert best.parts["policy"] == lineage.root.parts["policy"]
    assert MAGIC in reflection().texts(lineage)[best.parts["prompt"]]


def test_an_empty_instruction_is_a_failed_trial(tmp_path: Path) -> None:
    def mute(request: Generate, known: tuple[Document, ...]) -> str:
        return "" if "FAILURES" in request.prompt else "unknown"

    lineage = toy_session(tmp_path, rounds=1, engine=ScriptedEngine(mute, name="mute"), **roles()).improve()
    assert {r.error for r in lineage.round(0).rewards} == {"the instruction is empty"}
    assert lineage.size == 1


def test_a_perfect_prompt_proposes_nothing(tmp_path: Path) -> None:
    start = f"Do {MAGIC}."
    editor = Reflection(start, "{instruction} FAILURES", reflection().asking, 2, 3)
    lineage = session(tmp_path, 1, editor=editor).improve()
    assert (lineage.round(0).trials, lineage.score(lineage.root.id)) == ((), 1.0)


@pytest.mark.parametrize("changes", [{"minibatch": 0}, {"edits": 0}, {"failures": -1}, {"max_tokens": 0}])
def test_values_that_make_no_sense_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least"):
        reflection(**changes)


def test_templates_without_an_instruction_are_refused() -> None:
    with pytest.raises(ConfigError, match="instruction"):
        Reflection("Answer.", "no field", {"template": "{instruction} {question}"})  # type: ignore[arg-type]


def test_another_editor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdmissionError, match="editor=prompt_reflection"):
        toy_session(tmp_path, evaluator=PromptAccuracy())


def test_it_is_under_150_lines_of_code() -> None:
    """Docstrings, comments and blank lines aside: what the README says."""
    source = Path(evolution.__file__).read_text(encoding="utf-8")
    quiet = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = {n for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in quiet for n in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    assert len(lines) < 150
