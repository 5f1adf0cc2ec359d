"""SEAL's plugins keep the contracts of their roles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from selfimprove.compose import WeightedSum
from selfimprove.models import Lora
from selfimprove.records import Edit, Trial
from selfimprove.session import Session
from selfimprove.testing import EditorContract, EvaluatorContract, RewarderContract, UpdaterContract
from selfimprove_seal import Accuracy, ClosedBook, InnerLoop, LogLikelihood, ReSTEM, SelfEdits, ToolEdits
from selfimprove_seal.editor import ContextEditor, SelfEdit

LORA: dict[str, Any] = {"rank": 2, "alpha": 4, "targets": ["q_proj"], "learning_rate": 1.0, "epochs": 2}
HOSTILE = ("", " \n\t ", "\x00\x01\x1b[31m", "{", "[" * 5000, "\u202eabc\u2028def", "a\ud800b", "word " * 20_000, "\n" * 1000, '{"epochs": NaN}')


def editor(**changes: Any) -> SelfEdits:
    inner = InnerLoop(LORA, question="Question: {question} Answer:", answer_tokens=8, replicates=2)
    return SelfEdits(**{"inner": inner, "contexts": 2, "edits": 2, "max_tokens": 64, **changes})


def tools() -> ToolEdits:
    return ToolEdits(inner=InnerLoop(LORA, question="Question: {question} Answer:", answer_tokens=8), contexts=2, edits=2, max_tokens=64)


class Company:
    """The other roles: SEAL's own."""

    role: str

    def make_roles(self) -> dict[str, Any]:
        lora = Lora(1, 1, ("q_proj",), 1.0, 1, merge=True)
        everything = {"editor": editor(), "rewarder": Accuracy(), "updater": ReSTEM(lora), "evaluator": ClosedBook(arms=("untouched",))}
        return {role: plugin for role, plugin in everything.items() if role != self.role}


class AnEditor(Company, EditorContract):
    def make_bad_edits(self, session: Session) -> Sequence[Edit]:
        """Whatever a model may write, about the first item."""
        item = session.run.task.train[0].id
        return [Edit((session.lineage.root.id,), SelfEdit(t, "prompt", item, (("prompt", t),)), item) for t in HOSTILE]

    def test_hostile_edits_go_through_a_whole_round(self, tmp_path: Path) -> None:
        session = self.make_session(tmp_path)
        edits = self.make_bad_edits(session)
        trials = session.hook.apply(edits=edits, lineage=session.lineage, run=session.run)
        rewards = session.hook.reward(trials=trials, lineage=session.lineage, run=session.run)
        assert all((t.error is None) == (r.score is not None) for t, r in zip(trials, rewards, strict=True))
        assert {t.edit.payload.text for t in trials if t.error} >= {"", " \n\t "}
        session.hook.update(trials=trials, rewards=rewards, lineage=session.lineage, run=session.run)


class TestSelfEdits(AnEditor):
    def make_plugin(self) -> ContextEditor:
        return editor()


class TestFewShotEdits(AnEditor):
    def make_plugin(self) -> ContextEditor:
        return editor(prompt_name="few_shot")


class TestToolEdits(AnEditor):
    def make_plugin(self) -> ContextEditor:
        return tools()


class ARewarder(Company, RewarderContract):
    def make_bad_trials(self, session: Session) -> Sequence[Trial]:
        root = session.lineage.root
        edit = Edit((root.id,), SelfEdit("", "", session.run.task.train[0].id), "void")
        return [Trial(edit, root.derive("bad"), error="the edit is empty")]


class TestAccuracy(ARewarder):
    def make_plugin(self) -> Any:
        return Accuracy()


class TestLogLikelihood(ARewarder):
    def make_plugin(self) -> Any:
        return LogLikelihood()


class TestAccuracyWithTiesBroken(ARewarder):
    def make_plugin(self) -> Any:
        return WeightedSum([Accuracy(), LogLikelihood()], [1.0, 0.02])


@pytest.mark.parametrize("plugin", [Accuracy, LogLikelihood, ClosedBook])
def test_labels_are_declared_where_they_are_read(plugin: type) -> None:
    assert plugin.uses_labels is True  # type: ignore[attr-defined]


@pytest.mark.parametrize("plugin", [SelfEdits, ToolEdits, ReSTEM])
def test_and_not_elsewhere(plugin: type) -> None:
    assert not getattr(plugin, "uses_labels", False)


class AnUpdater(Company, UpdaterContract):
    pass


class TestReSTEM(AnUpdater):
    def make_plugin(self) -> Any:
        return ReSTEM(Lora(1, 1, ("q_proj",), 1.0, 1, merge=True))


class TestReSTEMFromTheRoot(AnUpdater):
    def make_plugin(self) -> Any:
        return ReSTEM(dict(LORA), restart=True, keep=2)


class TestReSTEMByLines(AnUpdater):
    def make_plugin(self) -> Any:
        return ReSTEM(Lora(1, 1, ("q_proj",), 1.0, 1, merge=True), lines=True, keep=2)


class TestClosedBook(Company, EvaluatorContract):
    def make_plugin(self) -> Any:
        return ClosedBook()


class TestClosedBookTwice(Company, EvaluatorContract):
    def make_plugin(self) -> Any:
        return ClosedBook(arms=("untouched", "gold"), seeds=2)
