"""One benchmark of several pieces: the same suite with other seeds, run on other machines or other days."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from jinja2 import TemplateError

from selfimprove.bench.report import html, markdown
from selfimprove.bench.result import SCHEMA, assembled, averaged
from selfimprove.bench.suite import checked
from selfimprove.errors import ConfigError, StorageError

UNFIT = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, TemplateError)
"""What a file that is not as it was written makes of reading it."""
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
    except UNFIT as e:
        raise StorageError(f"{' or '.join(map(str, paths))} is not as `bench` wrote it ({type(e).__name__}: {e}); restore it from a copy") from e


def _joined(paths: Sequence[Path], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = results[0]
    for path, other in zip(paths[1:], results[1:], strict=True):
        different = [what for what, of in SAME.items() if of(first) != of(other)]
        if different or not _same_configuration(first, other):
            different.append("the configuration of their arms")
            raise ConfigError(f"{path} is no piece of the benchmark of {paths[0]}: they differ in {different[0]}; run both with one suite and commit")
    seeds = [s for r in results for s in r["seeds"]]
    if twice := sorted({s for s in seeds if seeds.count(s) > 1}):
        raise ConfigError(f"seed {twice[0]} is in more than one piece; run every seed once, with seeds=[…]")
    suite = checked(first["suite"], {**first["written"], "seeds": sorted(seeds)})
    if not suite.name or Path(suite.name).name != suite.name:
        raise ValueError(f"{suite.name!r} is no name of a suite")
    arms = []
    for rows in zip(*(r["arms"] for r in results), strict=True):
        cells = sorted((c for row in rows for c in row["cells"]), key=lambda c: int(c["seed"]))
        arms.append(averaged({k: rows[0][k] for k in ROW}, cells, suite.unit))
    pieces = sorted((p for r in results for p in r["pieces"]), key=lambda p: list(p["seeds"]))
    failures = [f for r in results for f in r["failures"]]
    found = assembled(suite, arms, pieces, {"failures": failures, "left_out": first["left_out"], "base": results[_first(results)]["base"]})
    markdown(found), html(found)  # before anything is written
    return found


def _first(results: Sequence[Mapping[str, Any]]) -> int:
    """Which piece has the lowest seed: a configuration is shown with the first seed."""
    return min(range(len(results)), key=lambda i: min(results[i]["seeds"]))


def _same_configuration(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two pieces have one configuration, but for their seeds and for the folders that files of one name lie in."""
    pairs = [(one["base"][t], other["base"][t], one["base"][t], other["base"][t]) for t in one["base"]]
    for mine, theirs in zip(one["arms"], other["arms"], strict=True):
        pairs.append((mine["differs"], theirs["differs"], one["base"][mine["task"]], other["base"][mine["task"]]))
    return list(one["base"]) == list(other["base"]) and all(
        list(mine) == list(theirs) and all(_alike(mine[k], theirs[k], base["seed"], its_base["seed"]) for k in mine)
        for mine, theirs, base, its_base in pairs
    )


def _alike(value: Any, other: Any, seed: int, its: int) -> bool:
    """Whether two values are equal when the one's seed is written for the other's, in a text too; of absolute paths the last name counts."""
    if value == other and type(value) is type(other):
        return True
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(_alike(v, o, seed, its) for v, o in zip(value, other, strict=True))
    if not isinstance(value, str) or not isinstance(other, str):
        return type(value) is type(other) is int and (value, other) == (seed, its)
    if all(PurePath(p).is_absolute() for p in (value, other)):
        value, other = PurePath(value).name, PurePath(other).name
    either = f"(?:{seed}|{its})".join(map(re.escape, value.split(str(seed))))
    return re.fullmatch(either, other) is not None


SAME: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "the suite's name": lambda r: r["suite"],
    "what the suite says": lambda r: {k: v for k, v in r["written"].items() if k != "seeds"},
    "the arms": lambda r: [[row[k] for k in ROW if k != "differs"] for row in r["arms"]],
    "the arms that could not be made": lambda r: r["left_out"],
}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["schema"] != SCHEMA:
            raise ConfigError(f"{path} has schema {found['schema']}, this version reads {SCHEMA}; run its benchmark again: finished cells are kept")
        return dict(found)
    except (OSError, *UNFIT) as e:
        raise StorageError(f"{path} is no result of a benchmark ({type(e).__name__}); name the folder of one, or its result.json") from e
