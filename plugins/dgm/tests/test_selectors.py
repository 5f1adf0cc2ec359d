"""The archive equals the lineage it views; the selectors by hand and by law."""

from __future__ import annotations

import math
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove import identity
from selfimprove.code import CodeStore
from selfimprove.records import Candidate, Evaluation, Lineage, Part, Round
from selfimprove.selectors import Best
from selfimprove_dgm import Archive, CladeThompson, Islands, Repeated, SigmoidNovelty, Uniform
from selfimprove_dgm.islands import Settled, cell

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


CODES = [{f"operators/{i}.py": "" for i in range(n)} | {"config.json": f'{{"budget": {b}}}'} for n in range(3) for b in (1, 12)]


class _Codes:
    """A store whose part `n` is code `n`."""

    def get(self, part: Part) -> dict[str, str]:
        return CODES[int(part.digest)]


def settled(lineage: Lineage, islands: int = 3) -> Settled:
    archive = Settled(islands).reading(_Codes())  # type: ignore[arg-type]
    archive.follow(lineage)
    return archive


def coded(rounds: list[list[tuple[int, int | None]]]) -> Lineage:
    """The last of the grown views, where candidate i has code i mod 6."""
    plain = grown(rounds)[-1]
    part = {c.id: Part("code", str(i % len(CODES))) for i, c in enumerate(plain)}
    lineage = Lineage(Candidate(plain.root.id, {"code": part[plain.root.id]}))
    for r in plain.rounds:
        lineage = lineage + Round(children=tuple(Candidate(c.id, {"code": part[c.id]}, c.parents) for c in r.children), scores=r.scores)
    return lineage


@given(ROUNDS)
def test_children_of_the_root_go_to_all_islands(rounds: list[list[tuple[int, int | None]]]) -> None:
    archive = settled(coded([[(0, 1)] * 3, [(0, 2)] * 3, *rounds]))
    homes = archive.column("home")
    assert homes[0] == -1
    assert {homes[i] for i in range(1, len(archive)) if archive.parent[i] == 0} == {0, 1, 2}
    assert all(homes[i] == homes[p] for i, p in enumerate(archive.parent) if p > 0)


@given(ROUNDS)
def test_elites_are_the_best_of_their_cells(rounds: list[list[tuple[int, int | None]]]) -> None:
    lineage = coded([[(0, 1)] * 4, *rounds])
    archive = settled(lineage, 2)
    for island in (0, 1):
        best: dict[tuple[int, int], tuple[float, int]] = {}
        for i, c in enumerate(lineage):
            score, home = lineage.score(c.id), archive.column("home")[i]
            where = cell(CODES[i % len(CODES)])
            if score is not None and home in (-1, island) and (where not in best or score > best[where][0]):
                best[where] = (score, i)
        assert sorted(archive.elites(island).tolist()) == sorted(i for _, i in best.values())


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"config.json": "{"},
        {"config.json": "[]"},
        {"config.json": '{"budget": "x"}'},
        {"config.json": '{"budget": Infinity}'},
        {"config.json": "[" * 10**6},
    ],
)
def test_an_agent_that_cannot_be_read_has_a_cell(tree: dict[str, str]) -> None:
    assert cell(tree) == (0, 0)


class _Run:
    """What a selector asks of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rng(self, *name: str | int) -> np.random.Generator:
        return identity.rng(0, *name)


PLUGINS = {
    "dgm": SigmoidNovelty,
    "median": lambda: SigmoidNovelty(midpoint="median"),
    "uniform": Uniform,
    "islands": Islands,
    "hgm": CladeThompson,
    "greedy": lambda: Repeated(Best()),
}


def large(count: int, store: CodeStore) -> Lineage:
    """A lineage of `count` agents in rounds of 1,000, of six codes."""
    parts = [{"code": store.put(code)} for code in CODES]
    lineage, ids, results = Lineage(Candidate("root", parts[0])), ["root"], [{"a": float(i > 0), "b": float(i > 1)} for i in range(3)]
    for r in range(count // 1000):
        children = tuple(Candidate(f"{r}-{i}", parts[i % 6], (ids[(r * 1000 + 7 * i) % len(ids)],)) for i in range(1000))
        ids += [c.id for c in children]
        lineage = lineage + Round(
            children=children, scores=tuple((c.id, Evaluation(i % 3 / 2, per_item=results[i % 3])) for i, c in enumerate(children))
        )
    return lineage


def costs(plugin: Any, count: int, folder: Path) -> tuple[float, int, float]:
    """Of choosing after one more round: calls of functions and the shortest of five times in seconds; and bytes of what the selector keeps."""
    lineage, run = large(count, CodeStore(folder)), _Run(folder)
    tracemalloc.start()
    plugin.select(lineage=lineage, run=run)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    calls, times = [0], []

    def count_calls(frame: Any, event: str, argument: Any) -> None:
        calls[0] += event in ("call", "c_call")

    for i in range(6):
        child = lineage.root.derive(i)
        lineage = lineage + Round(children=(child,), scores=((child.id, Evaluation(0.5, per_item={"a": 1.0, "b": 0.0})),))
        sys.setprofile(count_calls if i == 0 else None)
        began = time.perf_counter()
        plugin.select(lineage=lineage, run=run)
        times.append(time.perf_counter() - began)
        sys.setprofile(None)
    return calls[0], kept, min(times[1:])


@pytest.mark.parametrize("name", PLUGINS)
def test_choosing_takes_as_many_steps_however_large_the_archive(name: str, tmp_path: Path) -> None:
    """Python takes the same steps, numpy's are linear, and so is memory; the slow test and `benchmarks/archive.py` have 100,000 agents."""
    few, many = (costs(PLUGINS[name](), count, tmp_path) for count in (2_000, 16_000))
    assert many[0] <= few[0] + 20, "calls"
    assert many[1] <= 8 * 1.4 * few[1] + 50_000, "memory grows linearly"
    assert many[2] < 0.010


@pytest.mark.slow
@pytest.mark.parametrize("name", PLUGINS)
def test_a_hundred_thousand_agents_are_no_burden(name: str, tmp_path: Path) -> None:
    few, many = (costs(PLUGINS[name](), count, tmp_path) for count in (10_000, 100_000))
    assert many[1] < 14 * few[1] + 50_000, "memory grows linearly"
    assert many[2] < 0.010
