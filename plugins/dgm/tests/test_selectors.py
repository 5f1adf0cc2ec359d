"""The archive equals the lineage it views; the selectors by hand and by law."""

from __future__ import annotations

import math
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove.records import Candidate, Evaluation, Lineage, Round
from selfimprove_dgm import Archive, Islands, SigmoidNovelty
from selfimprove_dgm.selectors import cell

ROUNDS = st.lists(st.lists(st.tuples(st.integers(0, 50), st.none() | st.integers(0, 4)), max_size=3), max_size=8)


def grown(rounds: list[list[tuple[int, int | None]]]) -> list[Lineage]:
    """Every view of a lineage: each pair is a parent and how many of four tasks its child solves (None: not measured)."""
    views = [Lineage(Candidate.root())]
    for r, made in enumerate(rounds):
        lineage = views[-1]
        known = list(lineage)
        children = [known[parent % len(known)].derive(r, i) for i, (parent, _) in enumerate(made)]
        per_item = [{str(k): float(k < won) for k in range(4)} if won is not None else None for _, won in made]
        scores = [(c.id, Evaluation(sum(p.values()) / 4, per_item=p)) for c, p in zip(children, per_item, strict=True) if p is not None]
        views.append(lineage + Round(children=tuple(children), scores=tuple(scores)))
    return views


@given(ROUNDS)
def test_an_archive_says_what_the_lineage_says(rounds: list[list[tuple[int, int | None]]]) -> None:
    views = grown(rounds)
    archive = Archive()
    for lineage in [*views, views[0], views[-1], views[len(views) // 2]]:  # forward, back and in between
        archive.follow(lineage)
        assert archive.ids == [c.id for c in lineage]
        assert list(archive.column("children")) == [lineage.child_count(c.id) for c in lineage]
        for value, candidate in zip(archive.score, lineage, strict=True):
            wanted = lineage.score(candidate.id)
            assert math.isnan(value) if wanted is None else value == pytest.approx(wanted)


@given(ROUNDS)
def test_a_clade_is_an_agent_and_its_descendants(rounds: list[list[tuple[int, int | None]]]) -> None:
    archive = Archive().follow(grown(rounds)[-1])
    clade = np.array(archive.column("won"))
    for i in range(len(archive) - 1, 0, -1):
        clade[archive.parent[i]] += clade[i]
    assert list(archive.column("clade_won")) == list(clade)


def test_weights_by_hand() -> None:
    found = SigmoidNovelty().weights(np.array([0.5, 0.9, np.nan]), np.array([1.0, 0.0, 0.0]))
    assert found == pytest.approx([0.25, 1 / (1 + math.exp(-4)), 0.0])


@given(st.lists(st.floats(0, 0.3, allow_subnormal=False), min_size=4, max_size=30, unique=True))
def test_a_midpoint_of_the_data_tells_weak_agents_apart(scores: list[float]) -> None:
    values, none = np.array(scores), np.zeros(len(scores))
    for midpoint in ("top3", "median", 0.5):
        weights = SigmoidNovelty(midpoint=midpoint).weights(values, none)  # type: ignore[arg-type]
        assert (np.diff(weights[np.argsort(values)]) >= 0).all(), "a better agent is never less likely"
        assert (weights > 0).all()


def test_half_leaves_weak_agents_alike_and_the_median_does_not() -> None:
    weak = np.array([0.02, 0.04, 0.06, 0.08, 0.10])
    ratio = {m: (w := SigmoidNovelty(midpoint=m).weights(weak, np.zeros(5)))[-1] / w[0] for m in (0.5, "median")}  # type: ignore[arg-type]
    assert ratio["median"] > 3 > ratio[0.5] > 1


@given(ROUNDS)
def test_children_of_the_root_go_to_all_islands(rounds: list[list[tuple[int, int | None]]]) -> None:
    archive = Archive().follow(grown([[(0, 1)] * 3, [(0, 2)] * 3, *rounds])[-1])
    homes = Islands(3).homes(archive)
    assert {homes[i] for i in range(1, len(archive)) if archive.parent[i] == 0} == {0, 1, 2}
    assert all(homes[i] == homes[p] for i, p in enumerate(archive.parent) if p > 0)


@pytest.mark.parametrize("tree", [{}, {"config.json": "{"}, {"config.json": "[]"}, {"config.json": '{"budget": "x"}'}])
def test_an_agent_that_cannot_be_read_has_a_cell(tree: dict[str, str]) -> None:
    assert cell(tree) == (0, 0)


class _Run:
    def rng(self, *name: object) -> np.random.Generator:
        return np.random.default_rng(0)


def large(count: int) -> Lineage:
    """A lineage of `count` agents in rounds of 1,000."""
    lineage, ids = Lineage(Candidate("root", {})), ["root"]
    for r in range(count // 1000):
        children = tuple(Candidate(f"{r}-{i}", {}, (ids[(r * 1000 + 7 * i) % len(ids)],)) for i in range(1000))
        ids += [c.id for c in children]
        lineage = lineage + Round(children=children, scores=tuple((c.id, Evaluation((r + i) % 5 / 4)) for i, c in enumerate(children)))
    return lineage


@pytest.mark.slow
def test_a_hundred_thousand_agents_are_no_burden() -> None:
    used = {}
    for count in (10_000, 100_000):
        lineage, selector = large(count), SigmoidNovelty()
        tracemalloc.start()
        selector.select(lineage, _Run())  # type: ignore[arg-type]
        used[count] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    assert used[100_000] < 14 * used[10_000], "memory grows linearly"
    times = []
    for i in range(5):
        child = lineage.latest.derive(i)
        lineage = lineage + Round(children=(child,), scores=((child.id, Evaluation(0.5)),))
        began = time.perf_counter()
        selector.select(lineage, _Run())  # type: ignore[arg-type]
        times.append(time.perf_counter() - began)
    assert min(times) < 0.010, times
