"""Lineages as SVG text: a small tree from left to right, coloured by score. Colours are classes, as in `charts`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH = 640
MARGIN = 12
ROW, COLUMN = 22, 56
"""The distance of two leaves, and the greatest of two generations; a deep lineage is drawn more narrowly."""
STEPS = 6
"""Classes ``s0`` … ``s5`` of the style sheet, from the lowest score to the highest; ``sn`` has no score."""

Member = Sequence[Any]
"""A candidate: its id, its parents' ids and its score (or None)."""


def tree(members: Sequence[Member], low: float, high: float) -> str:
    """The tree of a lineage, oldest member first; the best one has a ring. Args: low, high: the scores at the ends of the colours."""
    place = {m[0]: n for n, m in enumerate(members)}
    parents = [[place[p] for p in m[1] if place.get(p, n) < n] for n, m in enumerate(members)]
    depth: list[int] = []
    for above in parents:
        depth.append(1 + depth[above[0]] if above else 0)
    rows, count = _rows(parents)
    column = min(COLUMN, (WIDTH - 2 * MARGIN) / max(1, *depth)) if members else COLUMN
    at = [(round(MARGIN + d * column, 1), round(MARGIN + r * ROW, 1)) for d, r in zip(depth, rows, strict=True)]
    radius = round(max(2.5, min(7.0, column / 2.4)), 1)
    body = []
    for n, above in enumerate(parents):
        for number, p in enumerate(above):
            middle = round((at[p][0] + at[n][0]) / 2, 1)
            path = f"M{at[p][0]},{at[p][1]}C{middle},{at[p][1]} {middle},{at[n][1]} {at[n][0]},{at[n][1]}"
            body.append(f'<path class="{"link second" if number else "link"}" d="{path}"/>')
    best = members.index(max((m for m in members if _finite(m[2])), key=lambda m: m[2])) if scores(members) else None
    for n, (name, _, score) in enumerate(members):
        ring = " ring" if n == best else ""
        told = escape(f"{name}: no score" if score is None else f"{name}: {score:.3f}")
        body.append(
            f'<circle class="node {_class(score, low, high)}{ring}" cx="{at[n][0]}" cy="{at[n][1]}" r="{radius}"><title>{told}</title></circle>'
        )
    height = 2 * MARGIN + ROW * max(0, count - 1)
    label = f"A lineage of {len(members)} candidates, {max(depth, default=0)} generations deep" + (
        "" if best is None else f"; the best has a score of {members[best][2]:.3f}"
    )
    return f'<svg class="tree" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{"".join(body)}</svg>'


def legend(low: float, high: float) -> str:
    """What the colours mean."""
    swatches = "".join(f'<circle class="node s{n}" cx="{8 + 16 * n}" cy="8" r="6"/>' for n in range(STEPS))
    ramp = f'<svg viewBox="0 0 {16 * STEPS} 16" role="img" aria-label="from the lowest score to the highest">{swatches}</svg>'
    none = '<svg viewBox="0 0 16 16" aria-hidden="true"><circle class="node sn" cx="8" cy="8" r="6"/></svg>'
    return f'<p class="scale">{low:.3f} {ramp} {high:.3f} {none} no score</p>'


def scores(members: Sequence[Member]) -> list[float]:
    """The finite scores of a lineage's members."""
    return [float(m[2]) for m in members if _finite(m[2])]


def _finite(score: float | None) -> bool:
    return score is not None and math.isfinite(score)


def _rows(parents: Sequence[Sequence[int]]) -> tuple[list[float], int]:
    """The row of every member, and how many there are: a leaf takes the next one, others the middle of their children."""
    children: list[list[int]] = [[] for _ in parents]
    for n, above in enumerate(parents):
        if above:
            children[above[0]].append(n)
    rows, count = [0.0] * len(parents), 0
    stack = [(n, False) for n in reversed(range(len(parents))) if not parents[n]]
    while stack:  # without recursion: a chain may be long
        n, seen = stack.pop()
        if not children[n]:
            rows[n], count = float(count), count + 1
        elif seen:
            rows[n] = (rows[children[n][0]] + rows[children[n][-1]]) / 2
        else:
            stack += [(n, True), *((c, False) for c in reversed(children[n]))]
    return rows, count


def _class(score: float | None, low: float, high: float) -> str:
    if score is None or not math.isfinite(score):
        return "sn"
    share = (score - low) / (high - low) if high > low else 1.0
    return f"s{min(STEPS - 1, max(0, int(share * STEPS)))}"
