"""The contract of an updater that trains nothing, and what it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selfimprove.payloads import Text
from selfimprove.records import Candidate, Edit, Evaluation, Trial
from selfimprove.testing import NoopEditor, NoopRewarder, UpdaterContract
from selfimprove.updaters import BestOfGroup


class TestContract(UpdaterContract):
    def make_plugin(self) -> Any:
        return BestOfGroup()

    def make_roles(self) -> dict[str, Any]:
        return {"editor": NoopEditor(), "rewarder": NoopRewarder(), "evaluator": None}

    def test_the_next_round_makes_other_children(self, tmp_path: Path) -> None:
        """It makes no candidates: it takes those of the trials, which the editor salts with the round."""


def test_the_first_of_the_best_above_the_margin_is_kept() -> None:
    trials = [Trial(Edit(("p",), Text(str(i)), group), Candidate(f"{group}{i}", {})) for i, group in enumerate("aaabbcc")]
    rewards = [Evaluation(x) for x in (0.2, 0.5, 0.5, 0.1, 0.0)] + [Evaluation.failed("no"), Evaluation(0.3)]
    assert [c.id for c in BestOfGroup(0.1).update(trials, rewards)] == ["a1", "c6"]
    assert list(BestOfGroup(0.9).update(trials, rewards)) == []
