from __future__ import annotations

from typing import Any

import pytest

from selfimprove.records import Candidate, Evaluation, Lineage, Part, Round
from selfimprove.selectors import Best, Gate, Latest
from selfimprove.testing import SelectorContract

ROOT = Candidate.root(policy=Part("model", "m"))


class TestLatest(SelectorContract):
    def make_plugin(self) -> Any:
        return Latest()


class TestBest(SelectorContract):
    def make_plugin(self) -> Any:
        return Best()


class TestGate(SelectorContract):
    def make_plugin(self) -> Any:
        return Gate()


def chain(*scores: float | None) -> Lineage:
    """The root and its line of descendants, with these scores, the root's first."""
    lineage = Lineage(ROOT)
    if scores[0] is not None:
        lineage = lineage + Round(scores=((ROOT.id, Evaluation(scores[0])),))
    for i, score in enumerate(scores[1:]):
        child = lineage.latest.derive(i)
        lineage = lineage + Round(children=(child,), scores=() if score is None else ((child.id, Evaluation(score)),))
    return lineage


@pytest.mark.parametrize(
    ("selector", "scores", "chosen"),
    [
        (Latest(), (0.9, 0.1), 1),
        (Best(), (None, None), 0),
        (Best(), (0.5, 0.5, 0.4), 0),
        (Best(), (None, 0.1, 0.4, 0.2), 2),
        (Gate(), (0.5, 0.4), 0),
        (Gate(), (0.5, 0.5), 1),
        (Gate(tolerance=0.2), (0.5, 0.4), 1),
        (Gate(tolerance=0.2), (0.5, 0.4, 0.25), 1),  # against the best ancestor, not the last
        (Gate(), (0.5, None), 1),
        (Gate(), (None, 0.1), 1),
        (Gate(), (0.5, 0.2, 0.6), 2),
    ],
)
def test_chosen(selector: Any, scores: tuple[float | None, ...], chosen: int) -> None:
    lineage = chain(*scores)
    assert [c.id for c in selector.select(lineage)] == [list(lineage)[chosen].id]
