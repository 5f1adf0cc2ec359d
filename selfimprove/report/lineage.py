"""The lineage as one self-contained page: a tree of candidates of any strategy, coloured by score."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfimprove.records import Edit, Lineage
from selfimprove.report.read import History, described

TEMPLATE = Path(__file__).with_name("lineage.html")
CHARACTERS = 20_000
"""Of one edit, at most."""


def lineage_page(run: History) -> str:
    """A page that needs no server and no network: everything is in it, and what a model wrote is shown as text only."""
    data = json.dumps({"name": run.folder.name, "nodes": nodes(run.lineage)}, ensure_ascii=True, separators=(",", ":"))
    return TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", data.replace("<", "\\u003c"))


def nodes(lineage: Lineage) -> list[dict[str, Any]]:
    """One record per candidate, oldest first; `parent` is the position of its first parent, or -1."""
    place = {c.id: i for i, c in enumerate(lineage)}
    values = measured(lineage)
    made = edits(lineage)
    best = lineage.best()
    found = []
    for candidate in lineage:
        parent = candidate.parents[0] if candidate.parents else None
        own, before = values.get(candidate.id, {}), values.get(parent or "", {})
        both = [i for i in own if i in before]
        edit = made.get(candidate.id)
        found.append(
            {
                "id": candidate.id,
                "parent": place.get(parent or "", -1),
                "round": lineage.round_of(candidate.id) + 1,
                "score": lineage.score(candidate.id),
                "items": len(own),
                "gained": [i for i in both if own[i] > before[i]],
                "lost": [i for i in both if own[i] < before[i]],
                "edit": described(edit)[:CHARACTERS] if edit is not None else "",
                "note": getattr(edit.payload, "diagnosis", "") if edit is not None else "",
                "best": best is not None and candidate.id == best.id,
            }
        )
    return found


def measured(lineage: Lineage) -> dict[str, dict[str, float]]:
    """The last value of each item, by candidate."""
    found: dict[str, dict[str, float]] = {}
    for i in range(len(lineage)):
        for name, evaluation in lineage.round(i).scores:
            found.setdefault(name, {}).update(evaluation.per_item)
    return found


def edits(lineage: Lineage) -> Mapping[str, Edit]:
    """The edit that made each candidate; none for one that an updater made of several."""
    return {t.candidate.id: t.edit for i in range(len(lineage)) for t in lineage.round(i).trials}


def chain(lineage: Lineage, candidate: str) -> list[tuple[str, Edit]]:
    """(candidate, edit) from the first edit to the one that made this candidate."""
    made, found = edits(lineage), []
    current = lineage[candidate]
    while current.parents:
        if current.id in made:
            found.append((current.id, made[current.id]))
        current = lineage[current.parents[0]]
    return found[::-1]
