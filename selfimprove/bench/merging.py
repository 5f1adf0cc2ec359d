"""One benchmark of several pieces: the same suite with other seeds, run on other machines or other days."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfimprove.bench.result import SCHEMA, assembled, averaged
from selfimprove.bench.suite import checked
from selfimprove.errors import ConfigError, StorageError

ROW = ("name", "task", "kind", "of", "trained", "differs")
"""What tells a row of a report, whatever its seeds."""


def merged(paths: Sequence[Path]) -> dict[str, Any]:
    """The result of all pieces together: averages, comparisons and verdicts are made anew, from the grades of every cell.

    Args:
        paths: results (``result.json``), or folders of benchmarks that hold one.

    Raises: StorageError, where a file is no result; ConfigError, where the pieces are not of one suite, or share seeds.
    """
    if len(paths) < 2:
        raise ConfigError(f"--merge wants the folders of at least two benchmarks; got {len(paths)}")
    results = [_read(p / "result.json" if p.is_dir() else p) for p in paths]
    try:
        return _joined(paths, results)
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise StorageError(f"{' or '.join(map(str, paths))} is not as `bench` wrote it ({type(e).__name__}: {e}); restore it from a copy") from e


def _joined(paths: Sequence[Path], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = results[0]
    for path, other in zip(paths[1:], results[1:], strict=True):
        different = [what for what, of in SAME.items() if of(first) != of(other)]
        if different or not _same_base(first, other):
            different.append("the configuration of the first arm")
            raise ConfigError(f"{path} is no piece of the benchmark of {paths[0]}: they differ in {different[0]}; run both with one suite and commit")
    seeds = [s for r in results for s in r["seeds"]]
    if twice := sorted({s for s in seeds if seeds.count(s) > 1}):
        raise ConfigError(f"seed {twice[0]} is in more than one piece; run every seed once, with seeds=[…]")
    suite = checked(first["suite"], {**first["written"], "seeds": sorted(seeds)})
    arms = []
    for rows in zip(*(r["arms"] for r in results), strict=True):
        cells = sorted((c for row in rows for c in row["cells"]), key=lambda c: int(c["seed"]))
        arms.append(averaged({k: rows[0][k] for k in ROW}, cells, suite.unit))
    pieces = sorted((p for r in results for p in r["pieces"]), key=lambda p: list(p["seeds"]))
    failures = [f for r in results for f in r["failures"]]
    return assembled(suite, arms, pieces, {"failures": failures, "left_out": first["left_out"], "base": first["base"]})


def _same_base(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two pieces have one configuration when the seed of the one is written for the seed of the other."""
    seed, its = str(one["seeds"][0]), str(other["seeds"][0])
    mine, theirs = one["base"], other["base"]
    return {t: list(v) for t, v in mine.items()} == {t: list(v) for t, v in theirs.items()} and all(
        value == theirs[t][k] or str(value).replace(seed, its) == str(theirs[t][k]) for t, values in mine.items() for k, value in values.items()
    )


SAME: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "the suite's name": lambda r: r["suite"],
    "what the suite says": lambda r: {k: v for k, v in r["written"].items() if k != "seeds"},
    "the arms": lambda r: [[row[k] for k in ROW] for row in r["arms"]],
    "the arms that could not be made": lambda r: r["left_out"],
}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["schema"] != SCHEMA:
            raise ConfigError(f"{path} has schema {found['schema']}, this version reads {SCHEMA}; run its benchmark again: finished cells are kept")
        return dict(found)
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise StorageError(f"{path} is no result of a benchmark ({type(e).__name__}); name the folder of one, or its result.json") from e
