from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove.errors import ConfigError
from selfimprove.guards import Budget, NonFinite, Plateau, Rounds
from selfimprove.records import Candidate, Evaluation, Lineage, Part, Round
from selfimprove.testing import toy_session

ROOT = Candidate.root(policy=Part("model", "m"))


def scored(*scores: float | None) -> Lineage:
    lineage = Lineage(ROOT)
    for s in scores:
        lineage = lineage + Round(scores=() if s is None else ((ROOT.id, Evaluation(s)),))
    return lineage


def test_rounds() -> None:
    assert Rounds(2).should_stop(scored(0.1)) is None
    assert Rounds(2).should_stop(scored(0.1, 0.2)) == "all 2 rounds are done"
    assert Rounds(0).should_stop(scored()) is not None


@pytest.mark.parametrize(
    ("scores", "stops"),
    [
        ((0.1, 0.2), False),
        ((0.3, 0.2, 0.3), True),
        ((0.3, 0.2, 0.31), False),
        ((None, None, None), False),
        ((0.5, None, None), False),
        ((0.1, 0.5, 0.4, 0.5), True),
    ],
)
def test_plateau(scores: tuple[float | None, ...], stops: bool) -> None:
    assert (Plateau(patience=2).should_stop(scored(*scores)) is not None) == stops


@given(st.lists(st.none() | st.sampled_from([0.0, 0.25, 0.5, 1.0]), max_size=12), st.integers(1, 3))
def test_a_plateau_that_was_asked_every_round_says_what_a_new_one_says(scores: list[float | None], patience: int) -> None:
    asked = Plateau(patience)
    for n in [*range(len(scores) + 1), len(scores) // 2]:
        assert asked.should_stop(scored(*scores[:n])) == Plateau(patience).should_stop(scored(*scores[:n]))


def test_plateau_looks_at_every_round_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long run asks it after every round."""
    looks, look = [], Lineage.round
    monkeypatch.setattr(Lineage, "round", lambda lineage, i: looks.append(i) or look(lineage, i))
    guard = Plateau()
    for n in range(50):
        guard.should_stop(scored(*map(float, range(n))))
    assert looks == list(range(49))


def test_plateau_counts_only_rises_above_the_margin() -> None:
    assert Plateau(patience=1, margin=0.1).should_stop(scored(0.5, 0.55))
    assert not Plateau(patience=1, margin=0.01).should_stop(scored(0.5, 0.55))


def test_a_budget_stops_before_the_next_round(tmp_path: Path) -> None:
    session = toy_session(tmp_path, rounds=9, observers=[Budget(trained_tokens=1)])
    assert len(session.improve()) == 1
    assert "budget of 1 trained_tokens" in str(Budget(trained_tokens=1).should_stop(session.run))


@pytest.mark.parametrize(("limits", "message"), [({}, "got none"), ({"dollars": 3}, "got dollars")])
def test_a_budget_in_no_known_unit_is_refused(limits: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=f"generated_tokens.*{message}"):
        Budget(**limits)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(value: float) -> None:
    assert NonFinite().should_stop(scored(0.1)) is None
    assert "not finite" in str(NonFinite().should_stop(scored(value)))
    assert "not finite" in str(NonFinite().should_stop(Lineage(ROOT) + Round(rewards=(Evaluation(value),))))
    assert NonFinite().should_stop(scored()) is None
