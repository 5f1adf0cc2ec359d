"""The journal: one line of JSON per round, from which a lineage is read back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from selfimprove import records
from selfimprove.errors import ContractError, ResumeError
from selfimprove.hooks import hookimpl
from selfimprove.identity import canonical
from selfimprove.ledger import TIMED, Ledger
from selfimprove.records import Candidate, Lineage, Round
from selfimprove.run import Run
from selfimprove.storage import append_line, read_lines

SCHEMA = 1
"""The version that is written. `MIGRATIONS[n]` turns a line of version n into one of version n + 1."""
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

_TIMED = "ledger"  # the field that holds seconds, so no digest covers it


class Journal:
    """The observer that writes the journal. Registered first among the observers, so a round is durable before anyone hears of it."""

    def __init__(self) -> None:
        self._paid: set[str] = set()

    @hookimpl
    def setup(self, run: Run) -> None:
        self._paid = set(run.ledger.labelled)

    @hookimpl(tryfirst=True)
    def round_finished(self, lineage: Lineage, run: Run) -> None:
        run.ledger.tick()
        new_labels = sorted(run.ledger.labelled - self._paid)
        self._paid |= set(new_labels)
        write_line(
            run.folder / "journal.jsonl",
            {"round": records.encode_round(lineage.round(-1)), "labelled": new_labels, _TIMED: run.ledger.snapshot()},
        )


def write_root(path: Path, root: Candidate, ledger: Ledger) -> None:
    """The first line: the candidate that the run starts from, and what preparing it cost."""
    write_line(path, {"root": records.encode_candidate(root), "labelled": sorted(ledger.labelled), _TIMED: ledger.snapshot()})


def write_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append one line, with the schema version. The first line of a journal holds the root instead of a round."""
    append_line(path, json.dumps({"schema": SCHEMA, **line}, ensure_ascii=False, separators=(",", ":")))


def read(path: Path) -> tuple[Lineage, dict[str, Any], set[str]]:
    """The lineage, the last ledger snapshot ({} while there is none) and the ids of the labels paid for.

    Raises: ResumeError, for a journal that is empty, foreign or of an unknown version.
    """
    lineage: Lineage | None = None
    ledger: dict[str, Any] = {}
    labelled: set[str] = set()
    for number, text in enumerate(read_lines(path), 1):
        try:
            line = _migrated(json.loads(text))
            if lineage is None:
                lineage = Lineage(records.decode_candidate(line["root"]))
            else:
                lineage = lineage + _checked(records.decode_round(line["round"]))
            ledger = _checked_ledger(line[_TIMED]) if _TIMED in line else ledger
            labelled.update(map(str, line.get("labelled", ())))
        except (ValueError, LookupError, TypeError, AttributeError, ContractError) as e:
            raise ResumeError(f"{path}, line {number} is not a journal line ({type(e).__name__}: {e}); restore it from a copy") from e
    if lineage is None:
        raise ResumeError(f"{path} holds no run; start one with `selfimprove run`")
    return lineage, ledger, labelled


def spending(path: Path) -> list[dict[str, float]]:
    """What the run had spent at each line, by unit: after preparing, then after each round."""
    snapshots = [json.loads(text).get(_TIMED) or {} for text in read_lines(path)]
    return [dict(s.get("totals", {})) for s in snapshots]


def lineage_digest(path: Path) -> str:
    """The digest of everything that happened in a run, seconds excluded: equal runs have equal digests."""
    whole = hashlib.sha256()
    for text in read_lines(path):
        line = json.loads(text)
        ledger = line.pop(_TIMED, {})
        line["spent"] = {k: v for k, v in ledger.get("totals", {}).items() if k not in TIMED}
        whole.update(canonical(line).encode(errors="surrogatepass") + b"\n")
    return whole.hexdigest()[:32]


def _checked(one: Round) -> Round:
    """The round, if it holds values of the types that a round has. Raises: TypeError."""
    evaluations = [*one.rewards, *(e for _, e in one.scores)]
    texts = [*one.parents, *(i for i, _ in one.scores), *(e.error or "" for e in evaluations)]
    texts += [i for c in (*one.children, *(t.candidate for t in one.trials)) for i in (c.id, *c.parents)]
    maps = [m for e in evaluations for m in (e.metrics, e.per_item)]
    if len(one.trials) != len(one.rewards):
        raise ValueError(f"{len(one.rewards)} rewards for {len(one.trials)} trials")
    if not all(isinstance(m, Mapping) for m in maps):
        raise TypeError("metrics and items are no mappings")
    if not all(isinstance(t, str) for t in (*texts, *(k for m in maps for k in m))):
        raise TypeError("ids, names and errors are no texts")
    if not all(isinstance(v, int | float) for v in (*(e.score or 0 for e in evaluations), *(v for m in maps for v in m.values()))):
        raise TypeError("measurements are no numbers")
    return one


def _checked_ledger(snapshot: Any) -> dict[str, Any]:
    """The snapshot, if a ledger can go back to it. Raises: ValueError."""
    match snapshot:
        case {"totals": dict() as totals, "by_stage": dict() as stages}:
            amounts = [v for u in (totals, *stages.values()) for v in (u.values() if isinstance(u, dict) else [None])]
            if all(isinstance(v, int | float) for v in amounts):
                return dict(snapshot)
    raise ValueError("its ledger holds no amounts by unit and stage")


def _migrated(line: dict[str, Any]) -> dict[str, Any]:
    while (version := line.get("schema")) != SCHEMA:
        if version not in MIGRATIONS:
            raise ResumeError(f"journal of schema version {version}; this package writes {SCHEMA} and reads {sorted([*MIGRATIONS, SCHEMA])}")
        line = {**MIGRATIONS[version](line), "schema": version + 1}
    return line
