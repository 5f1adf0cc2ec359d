"""What choosing parents costs in a large archive: milliseconds of `select` and bytes of its view, by selector and number of agents.

    python benchmarks/archive.py

The lineage is synthetic: every agent has a parent drawn from all older ones, a score on four tasks, and one of fifty codes. A selector first
reads the whole lineage (once, as after a resume); then a round with one child arrives, and a choice is timed, `--repetitions` times. `hgm_task` is
HGM's choice of the agent to measure. `slope` is that of the logarithm over the logarithm of the number of agents: 1 is linear growth.
Aim: under 10 ms at 100,000 agents, and memory that grows linearly (columns double when they are full). Writes benchmarks/results/archive.json.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from _machine import RESULTS, commit, describe, versions, warn_if_busy

from selfimprove.code import CodeStore
from selfimprove.identity import rng
from selfimprove.records import Candidate, Evaluation, Lineage, Part, Round
from selfimprove.selectors import Best, Latest
from selfimprove.storage import write_json
from selfimprove_dgm import Archive, CladeThompson, Islands, Repeated, SigmoidNovelty, Uniform
from selfimprove_dgm.genome import donors, initial
from selfimprove_dgm.hgm import Standing


class Task:
    """HGM's choice of the agent to measure, in the shape of a selector."""

    def __init__(self) -> None:
        self._archive = Archive()

    def select(self, lineage: Lineage, run: Any) -> int | None:
        return Standing(self._archive.follow(lineage), (), lineage).sampled(60, run.rng("task", len(lineage)))


SIZES = (1_000, 10_000, 100_000)
TASKS = tuple("abcd")
SELECTORS: Mapping[str, Callable[[], Any]] = {
    "dgm": SigmoidNovelty,
    "dgm_top3": lambda: SigmoidNovelty(midpoint="top3"),
    "dgm_median": lambda: SigmoidNovelty(midpoint="median"),
    "uniform": Uniform,
    "islands": Islands,
    "hgm": CladeThompson,
    "hgm_task": Task,
    "greedy": lambda: Repeated(Best()),
    "no_archive": lambda: Repeated(Latest()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--selectors", nargs="+", choices=[*SELECTORS], default=[*SELECTORS])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS / "archive.json")
    options = parser.parse_args()
    load = warn_if_busy()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        parts = codes(Path(folder))
        for size in options.sizes:
            tracemalloc.start()
            lineage = grown(size, parts)
            rows.append({"what": "lineage", "agents": size, "bytes": tracemalloc.get_traced_memory()[0]})
            tracemalloc.stop()
            for name in options.selectors:
                row, lineage = measured(name, lineage, Path(folder), options.repetitions)
                rows.append({**row, "agents": size})
                print(name, size, {k: round(v, 3) for k, v in row.items() if k != "what"})
    slopes = {what: {k: slope(rows, what, k) for k in ("select_ms", "bytes")} for what in ("lineage", *options.selectors)}
    largest = {r["what"]: r["select_ms"] for r in rows if r["agents"] == max(options.sizes) and "select_ms" in r}
    found = {"select_ms": largest, "slopes": slopes, "rows": rows, "load": load, "machine": describe(torch.device("cpu"))}
    write_json(options.out, {**found, "commit": commit(), "versions": versions()})


def codes(folder: Path) -> list[Part]:
    """Fifty agents' codes that differ in their operators and budgets."""
    store, tree = CodeStore(folder), dict(initial())
    found = []
    for i in range(50):
        known = dict(list(donors().items())[: i % 9])
        budget = {"config.json": tree["config.json"].replace('"budget": 12', f'"budget": {12 << (i % 7)}')}
        found.append(store.put({**tree, **budget, **{f"operators/{n}.py": t for n, t in known.items()}, "number.txt": str(i)}))
    return found


def grown(size: int, parts: Sequence[Part]) -> Lineage:
    """A lineage of so many agents, in rounds of up to 1,000."""
    chance = np.random.default_rng(0)
    results = [{t: float(k < won) for k, t in enumerate(TASKS)} for won in range(len(TASKS) + 1)]
    lineage, ids = Lineage(Candidate("root", {"code": parts[0]})), ["root"]
    while len(ids) < size:
        first, count = len(ids), min(1_000, size - len(ids))
        parents = [ids[i] for i in chance.integers(first, size=count)]
        children = tuple(Candidate(f"{first + i}", {"code": parts[(first + i) % len(parts)]}, (p,)) for i, p in enumerate(parents))
        ids += [c.id for c in children]
        scores = tuple((c.id, evaluation(results[int(chance.integers(len(results)))])) for c in children)
        lineage = lineage + Round(children=children, scores=scores)
    return lineage


def evaluation(per_item: Mapping[str, float]) -> Evaluation:
    return Evaluation(sum(per_item.values()) / len(per_item), per_item=per_item)


def measured(name: str, lineage: Lineage, folder: Path, repetitions: int) -> tuple[dict[str, Any], Lineage]:
    """What a selector costs on a lineage, and the lineage after the rounds that were added."""
    plugin, run = SELECTORS[name](), SimpleNamespace(folder=folder, rng=lambda *key: rng(0, *key))
    choose = partial(plugin.select, run=run)
    tracemalloc.start()
    choose(lineage=lineage)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    times = []
    for i in range(repetitions):
        child = lineage.latest.derive(name, i)
        lineage = lineage + Round(children=(child,), scores=((child.id, evaluation(dict.fromkeys(TASKS, i % 2))),))
        began = time.perf_counter()
        choose(lineage=lineage)
        times.append(1e3 * (time.perf_counter() - began))
    return {"what": name, "select_ms": statistics.median(times), "select_ms_worst": max(times), "bytes": size}, lineage


def slope(rows: Sequence[Mapping[str, Any]], what: str, field: str) -> float | None:
    """The exponent of growth, by least squares; None where there is nothing to fit."""
    points = [(math.log(r["agents"]), math.log(max(r[field], 1e-9))) for r in rows if r["what"] == what and field in r]
    return float(np.polyfit(*zip(*points, strict=True), 1)[0]) if len(points) > 1 else None


if __name__ == "__main__":
    main()
