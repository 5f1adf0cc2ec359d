"""Past runs: one row for each run folder, filtered, sorted, compared, or as a data frame. Imports no plugin."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from selfimprove import journal, records, runfolder
from selfimprove.discovery import nearest
from selfimprove.errors import ConfigError, ResumeError, StorageError
from selfimprove.ledger import UNITS

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMNS = ("run", "strategy", "task", "seed", "rounds", "best", "test", "flops")
"""What `selfimprove runs` shows, besides what a filter or the order names."""
TRANSDUCTIVE = "task.transductive"
"""The key that is shown wherever a run trains on its sealed questions."""
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
}
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError, ResumeError, StorageError)


def rows(root: Path) -> Iterator[dict[str, Any]]:
    """One mapping for each run under a folder, cells of benchmarks included: what it chose, reached and spent, then its whole configuration.

    A value of the configuration stands under its dotted key. A run that cannot be read has the key ``unreadable``.
    """
    for path in sorted(root.rglob(runfolder.CONFIG)):
        if (path.parent / runfolder.VERSIONS).exists():
            yield row(path.parent)


def row(folder: Path) -> dict[str, Any]:
    """The mapping of one run folder, as `rows` gives it."""
    try:
        settings = yaml.safe_load((folder / runfolder.CONFIG).read_text(encoding="utf-8"))  # as written: no lookup of the environment
        choices = dict(settings.get("choices", {}))
        found: dict[str, Any] = {
            "run": str(folder),
            "strategy": choices.get("strategy"),
            "task": choices.get("task"),
            "seed": settings.get("seed"),
            "rounds": 0,
            "candidates": 0,
            "best": None,
            "test": None,
        }
        if (folder / runfolder.JOURNAL).exists():
            lineage, ledger, _ = journal.read(folder / runfolder.JOURNAL)
            best = lineage.best()
            found |= {"rounds": len(lineage), "candidates": lineage.size, "best": None if best is None else lineage.score(best.id)}
            found |= {u: ledger.get("totals", {}).get(u, 0.0) for u in UNITS}
        if (folder / runfolder.TEST).exists():
            test = json.loads((folder / runfolder.TEST).read_text(encoding="utf-8"))
            found["test"] = next((records.decode_evaluation(e).score for i, e in test["scores"] if i == test["candidate"]), None)
        return {**found, **{k: v for k, v in runfolder.flat(settings).items() if k not in found}}
    except _UNREADABLE as e:
        return {"run": str(folder), "unreadable": f"{type(e).__name__}: {e}".splitlines()[0]}


def chosen(found: Sequence[Mapping[str, Any]], filters: Sequence[str], order: str | None = None) -> list[Mapping[str, Any]]:
    """The rows that pass every filter (``strategy=srt``, ``test>0.3``, ``updater.keep!=2``), in an order (``-test`` is descending).

    Raises: ConfigError, for a filter that is none, or a key that no row has.
    """
    keys = {k for r in found for k in r}
    kept = list(found)
    for text in filters:
        match = re.fullmatch(r"([\w.\-]+)(!=|>=|<=|=|>|<)(.*)", text)
        if match is None:
            raise ConfigError(f"{text!r} is no filter; write key=value, or one of !=, >, <, >=, <= instead of =")
        key, sign = match[1], match[2]
        try:
            value = yaml.safe_load(match[3] or "null")
        except (yaml.YAMLError, ValueError) as e:
            raise ConfigError(f"{text!r}: the value is no YAML ({str(e).splitlines()[0]}); quote it") from e
        _check_key(key, keys, bool(found))
        kept = [r for r in kept if _holds(r.get(key), sign, value)]
    if order:
        key = order.removeprefix("-")
        _check_key(key, keys, bool(found))
        known = sorted((r for r in kept if r.get(key) is not None), key=lambda r: _sortable(r[key]), reverse=order.startswith("-"))
        kept = [*known, *(r for r in kept if r.get(key) is None)]
    return kept


def compared(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, first, second) of everything in which two runs differ: results first, then the configuration."""
    keys = list(dict.fromkeys((*one, *other)))
    return [(k, one.get(k), other.get(k)) for k in keys if one.get(k) != other.get(k)]


def to_dataframe(root: Path | str = "runs") -> DataFrame:
    """A data frame with a row for each run under a folder and a column for each key of `rows`. Needs pandas."""
    try:
        import pandas as pd
    except ImportError as e:
        raise ConfigError("to_dataframe needs pandas, which is not installed; install it with `pip install 'selfimprove[notebooks]'`") from e
    return pd.DataFrame(list(rows(Path(root))))


def _check_key(key: str, keys: set[str], any_row: bool) -> None:
    if any_row and key not in keys:
        raise ConfigError(f"no run has the key {key!r}{nearest(key, keys)}; results are {', '.join(COLUMNS)}, the rest is the configuration")


def _holds(have: Any, sign: str, want: Any) -> bool:
    try:
        return _COMPARE[sign](have, want)
    except TypeError:  # None, or a text against a number
        return False


def _sortable(value: Any) -> tuple[int, Any]:
    """A key that orders numbers before everything else."""
    return (0, value) if isinstance(value, int | float) else (1, str(value))
