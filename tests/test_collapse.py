"""A run that collapses is stopped, or goes on from before; bounds by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove.collapse import BeforeCollapse, Collapse
from selfimprove.errors import ConfigError
from selfimprove.graders import Exact
from selfimprove.models import Lora
from selfimprove.policy_gradient import PolicyGradient
from selfimprove.records import Candidate, Evaluation, Lineage, Round
from selfimprove.rollouts import PassAtK, Rollouts
from selfimprove.testing import toy_session
from selfimprove.testing.toys import NoopRewarder


def lineage_of(*across: float) -> Lineage:
    """A chain: each round has the last one's child as parent, whose rollouts have this share of one answer."""
    lineage = Lineage(Candidate.root())
    for number, value in enumerate(across):
        parent = lineage.latest
        scores = ((parent.id, Evaluation(None, {"truth/across": value}, error="-")),)
        lineage = lineage + Round((parent.id,), children=(parent.derive(number),), scores=scores)
    return lineage


# ---- the guard ----


@pytest.mark.parametrize(
    ("patience", "across", "stops"), [(1, (0.2, 0.9), True), (2, (0.2, 0.9), False), (2, (0.9, 0.8), True), (1, (), False), (3, (0.9,), False)]
)
def test_a_collapse_stops_a_run(patience: int, across: tuple[float, ...], stops: bool) -> None:
    reason = Collapse(above={"across": 0.5}, patience=patience).should_stop(lineage_of(*across))
    assert bool(reason) is stops
    assert reason is None or "truth/across is" in reason


def test_a_bound_on_how_fast_a_metric_rises() -> None:
    guard = Collapse(rise={"across": 0.3})
    assert not guard.should_stop(lineage_of(0.9)), "the root has no parent that it rose from"
    assert not guard.should_stop(lineage_of(0.1, 0.35, 0.6, 0.85)), "slowly as far as it likes"
    reason = guard.should_stop(lineage_of(0.1, 0.5))
    assert reason is not None
    assert "rose by 0.400 in one update, more than 0.3" in reason
    assert not guard.should_stop(lineage_of(0.9, 0.1)), "falling is not rising"


def test_a_candidate_is_compared_with_its_own_parent() -> None:
    lineage = lineage_of(0.1, 0.5)
    root = lineage.root
    again = lineage + Round((root.id,), children=(root.derive("again"),), scores=((root.id, Evaluation(None, {"truth/across": 0.1}, error="-")),))
    assert Collapse(rise={"across": 0.3}).should_stop(again) is None
    back = BeforeCollapse(rise={"across": 0.3})
    assert back.select(lineage) == [root]
    assert back.select(again) == [again.latest]


def test_bounds_below() -> None:
    guard = Collapse(below={"across": 0.3})
    assert guard.should_stop(lineage_of(0.2))
    assert not guard.should_stop(lineage_of(0.4))


@pytest.mark.parametrize("name", ["selector", "guard"])
def test_without_the_monitor_nothing_watches_in_silence(tmp_path: Path, name: str) -> None:
    watched: dict[str, Any] = {"guard": {"observers": [Collapse(above={"across": 0.5})]}, "selector": {"selector": BeforeCollapse()}}
    editor = Rollouts({"template": "{context}\n{question}", "max_tokens": 16}, 1, 2)  # type: ignore[arg-type]
    updater = PolicyGradient(Lora(1, 1, ("q_proj",), 1.0, 1))
    with pytest.raises(ConfigError, match=r"middleware=\[truth\]"):
        toy_session(
            tmp_path, rounds=2, grader=Exact(), editor=editor, rewarder=NoopRewarder(), updater=updater, evaluator=PassAtK(1), **watched[name]
        ).improve()


def test_a_guard_that_goes_by_labels_says_so() -> None:
    assert Collapse(above={"gap": 0.5}).uses_labels
    assert not Collapse(above={"across": 0.5}, below={"entropy": 0.1}).uses_labels
    assert BeforeCollapse(below={"accuracy": 0.5}).uses_labels
    assert BeforeCollapse(rise={"gap": 0.5}).uses_labels


@pytest.mark.parametrize("options", [{"above": {"acros": 1}}, {"rise": {"acros": 1}}, {"patience": 0}])
def test_bounds_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Collapse bounds|patience"):
        Collapse(**options)


# ---- the selector ----


@given(st.lists(st.floats(0, 1, allow_subnormal=False), max_size=8))
def test_the_candidate_before_a_collapse(across: list[float]) -> None:
    lineage = lineage_of(*across)
    [chosen] = BeforeCollapse(above={"across": 0.5}).select(lineage)
    candidates = list(lineage)
    first = next((i for i, x in enumerate(across) if x > 0.5), None)
    assert chosen.id == candidates[len(across) if first is None else max(0, first - 1)].id


def test_a_branch_after_a_collapse_is_healthy_again() -> None:
    lineage = lineage_of(0.1, 0.9)  # root, a (collapsed), b
    root, a, b = lineage
    assert BeforeCollapse(above={"across": 0.5}).proven(lineage) == root
    selector = BeforeCollapse(above={"across": 0.5})
    assert selector.select(lineage) == [root]
    again = lineage + Round((root.id,), children=(root.derive("again"),), scores=((root.id, Evaluation(None, {"truth/across": 0.1}, error="-")),))
    assert selector.select(again) == [again.latest]
    assert {a.id, b.id} <= {c.id for c in again}
