"""The truth monitor by hand on scripted rollouts, and what it charges."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove.graders import Exact
from selfimprove.hooks import hookimpl
from selfimprove.journal import lineage_digest
from selfimprove.models import Lora
from selfimprove.payloads import Rollout
from selfimprove.policy_gradient import PolicyGradient
from selfimprove.records import Edit, Evaluation, Trial
from selfimprove.rollouts import PassAtK, Rollouts
from selfimprove.session import Session
from selfimprove.testing import digest_after_kill, kill_points, toy_session
from selfimprove.testing.toys import NoopRewarder
from selfimprove.truth import TruthMonitor, answers, preferred, truth_of


class First:
    """1 for the first rollout of a group."""

    consumes = (Rollout,)

    @hookimpl
    def reward(self, trials: Sequence[Trial]) -> Sequence[Evaluation]:
        seen: set[str] = set()
        return [Evaluation(float(t.edit.group not in seen and not seen.add(t.edit.group))) for t in trials]  # type: ignore[func-returns-value]


def session(folder: Path, rounds: int = 2, **options: Any) -> Session:
    asking: Any = {"template": "{context}\n{question}", "max_tokens": 16}
    roles = {
        "editor": Rollouts(asking, 2, 3),
        "rewarder": First(),
        "updater": PolicyGradient(Lora(1, 1, ("q_proj",), 1.0, 1)),
        "evaluator": PassAtK(2),
    }
    return toy_session(folder, rounds=rounds, grader=Exact(), **{"middleware": [TruthMonitor()], **roles, **options})


def test_agreement_by_hand() -> None:
    found = answers([1, 1, 2, None, 1, 1], [[0, 1, 2], [3, 4, 5]])
    assert found["within"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert found["across"] == pytest.approx(4 / 6)
    assert found["no_answer"] == pytest.approx(1 / 6)
    assert found["entropy"] == pytest.approx((0.6365141682948128 + 0) / 2)


@given(st.lists(st.none() | st.integers(0, 2), min_size=1, max_size=12))
def test_shares_are_shares(classes: list[int | None]) -> None:
    found = answers(classes, [list(range(len(classes)))])
    assert found["within"] == found["across"] <= 1
    assert found["entropy"] >= 0


def test_what_a_reward_prefers() -> None:
    assert preferred([0, 1, 2], {0: 1.0, 1: 0.0, 2: 1.0}) == [0, 2]
    assert preferred([0, 1], {0: 0.0, 1: 0.0}) == []
    assert preferred([0, 1], {0: 1.0, 1: 1.0}) == [0, 1]
    assert preferred([0, 1], {}) == []


def test_a_rounds_truth(tmp_path: Path) -> None:
    lineage = session(tmp_path).improve()
    found = truth_of(lineage.round(0))
    assert {"reward", "accuracy", "gap", "pseudo_label", "within", "across", "entropy", "no_answer", "kl"} == found.keys()
    assert found["reward"] == pytest.approx(1 / 3)
    assert found["gap"] == pytest.approx(found["reward"] - found["accuracy"])
    [(who, what)] = [(i, e) for i, e in lineage.round(0).scores if "truth/reward" in e.metrics]
    assert who == lineage.root.id
    assert what.score is None


def test_scores_and_policies_are_what_they_are_without_it(tmp_path: Path) -> None:
    """It reads labels and scores rollouts, and nothing that is learnt or chosen depends on it."""
    with_it, without = (session(tmp_path / n, middleware=m).improve() for n, m in (("with", [TruthMonitor()]), ("without", [])))
    assert [c.id for c in with_it] == [c.id for c in without]
    assert [with_it.score(c.id) for c in with_it] == [without.score(c.id) for c in without]


def test_without_labels_it_reads_none(tmp_path: Path) -> None:
    one = session(tmp_path, evaluator=None, middleware=[TruthMonitor(labels=False)])
    lineage = one.improve()
    assert one.run.ledger.totals["labels"] == 0
    assert "accuracy" not in truth_of(lineage.round(0))


def test_other_payloads_are_left_alone(tmp_path: Path) -> None:
    lineage = toy_session(tmp_path, middleware=[TruthMonitor()]).improve()
    assert truth_of(lineage.round(0)) == {}


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    maker = partial(
        toy_session,
        rounds=1,
        grader=Exact(),
        middleware=[TruthMonitor()],
        editor=Rollouts({"template": "{context}\n{question}", "max_tokens": 16}, 1, 2),  # type: ignore[arg-type]
        rewarder=NoopRewarder(),
        updater=PolicyGradient(Lora(1, 1, ("q_proj",), 1.0, 1)),
        evaluator=PassAtK(1, greedy=False),
    )
    total = kill_points(maker, tmp_path / "whole")
    whole = lineage_digest(tmp_path / "whole" / "journal.jsonl")
    for at in sorted({0, 1, total // 3, 2 * total // 3, total - 1}):
        assert digest_after_kill(maker, tmp_path / str(at), at) == whole, f"killed at instant {at} of {total}"


def test_edits_are_records() -> None:
    assert Edit(("p",), Rollout("x", ids=[1], logprobs=[-1.0])).payload.ids == (1,)  # type: ignore[arg-type]
