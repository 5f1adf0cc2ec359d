"""The contract of every role, the conformance of the whole strategy, and a run in which instructions really get better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfimprove import Edit, testing
from selfimprove.errors import ConfigError
from selfimprove.models import Document, Generate
from selfimprove.rollouts import PassAtK, instruction_of
from selfimprove.session import Session
from selfimprove.updaters import BestOfGroup
from selfimprove_prompt_evolution import Gain, Instruction, Pareto, Reflection, frontier

MAGIC = "look closely"


def answer(request: Generate, known: tuple[Document, ...]) -> str:
    """A model that is right where its instruction holds the magic words, and finds them where it is shown a failure."""
    if "FAILURES" in request.prompt:
        return f"Please {MAGIC} {request.seed % 3}" if request.seed % 2 else "Try harder"
    question = request.prompt.rpartition("|")[2]
    return testing.ToyTask().facts[question] if MAGIC in request.prompt else "unknown"


def reflection(**changes: Any) -> Reflection:
    asking: Any = {"template": "{instruction}|{question}", "max_tokens": 8, "temperature": 0.0}
    return Reflection("Answer.", "{instruction} FAILURES {failures} BEST {history}", asking, **{"minibatch": 2, "edits": 3, **changes})


def session(folder: Path, rounds: int = 3, **changes: Any) -> Session:
    roles = {"selector": Pareto(), "editor": reflection(), "rewarder": Gain(), "updater": BestOfGroup(), "evaluator": PassAtK(1, greedy=False)}
    return testing.toy_session(folder, rounds=rounds, **{"engine": testing.ScriptedEngine(answer, name="magic"), **roles, **changes})


class Contract:
    """What every role is tested in: a session of the whole strategy."""

    def make_session(self, folder: Path) -> Session:
        return session(folder)


class TestEditor(Contract, testing.EditorContract):
    def make_plugin(self) -> Reflection:
        return reflection()

    def make_bad_edits(self, session: Session) -> list[Edit]:
        return [Edit((session.lineage.root.id,), Instruction(text)) for text in ("", "\x00{question}", "\ud800")]


class TestRewarder(Contract, testing.RewarderContract):
    def make_plugin(self) -> Gain:
        return Gain()


class TestSelector(Contract, testing.SelectorContract):
    def make_plugin(self) -> Pareto:
        return Pareto()


class TestStrategy(testing.StrategyConformance):
    strategy = "prompt_evolution"


def test_instructions_get_better_and_the_weights_stay(tmp_path: Path) -> None:
    one = session(tmp_path)
    lineage = one.improve()
    best = lineage.best()
    assert best is not None
    assert (lineage.score(lineage.root.id), lineage.score(best.id)) == (0.0, 1.0)
    assert best.parts["policy"] == lineage.root.parts["policy"]
    assert MAGIC in instruction_of(one.run, best)


def test_a_frontier_leaves_out_who_is_dominated() -> None:
    grades = np.array([[1, 0, 0], [0, 1, 1], [0, 1, 0]])
    assert frontier(grades).tolist() == [1, 2, 0]


def test_a_perfect_prompt_and_an_empty_answer_propose_nothing(tmp_path: Path) -> None:
    perfect = session(tmp_path / "perfect", editor=Reflection(f"Do {MAGIC}.", "{instruction} {failures}", reflection().asking)).improve()
    assert (perfect.round(0).trials, perfect.score(perfect.root.id)) == ((), 1.0)
    mute = session(tmp_path / "mute", engine=testing.ScriptedEngine(lambda request, known: "", name="mute")).improve()
    assert mute.size == 1


@pytest.mark.parametrize(
    "changes", [{"minibatch": 0}, {"edits": 0}, {"shown": 0}, {"reflection": "no failures"}, {"asking": {"template": "{question}"}}]
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"at least|the field"):
        Reflection(**{"start": "Answer.", "reflection": "{failures}", "asking": reflection().asking, **changes})
