from __future__ import annotations

import pytest

from selfimprove.records import Candidate, Evaluation, Lineage, Part, Round
from selfimprove.retention import Retention

ROOT = Candidate.root(policy=Part("model", "m"))


def line(*scores: float) -> tuple[Lineage, list[Candidate]]:
    lineage = Lineage(ROOT)
    for i, s in enumerate(scores):
        child = lineage.latest.derive(i)
        lineage = lineage + Round(children=(child,), scores=((child.id, Evaluation(s)),))
    return lineage, list(lineage)


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (Retention(last=2, best=False), {3, 4}),
        (Retention(last=1, best=True), {4, 2}),
        (Retention(last=0, best=False), set()),
        (Retention(last=0, best=False, spaced=2), {1, 3}),
        (Retention(last=99, best=True, spaced=1), {0, 1, 2, 3, 4}),
    ],
)
def test_kept(rule: Retention, kept: set[int]) -> None:
    lineage, members = line(0.1, 0.9, 0.2, 0.3)
    found = rule.kept(lineage)
    assert {members.index(c) for c in found} == kept
    assert len({c.id for c in found}) == len(found)
