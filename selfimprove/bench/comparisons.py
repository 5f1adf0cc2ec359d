"""Which arms are compared, which may not be, and what each comparison says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from selfimprove.bench import inference
from selfimprove.bench.inference import ALPHA, POWER, Difference, Grades
from selfimprove.bench.suite import Suite
from selfimprove.errors import ConfigError


def comparisons(suite: Suite, arms: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every strategy against the null arms that are its own and against the other strategies, corrected for their number.

    Tasks with the same budget are compared together, others apart: a comparison is at one cost.
    """
    found: list[dict[str, Any]] = []
    measured: list[tuple[dict[str, Any], Difference, Grades, Grades]] = []
    for one, other in _pairs(suite, arms):
        grades = _grades(one), _grades(other)
        entry: dict[str, Any] = {"one": one[0]["name"], "other": other[0]["name"], "kind": other[0]["kind"]}
        entry |= {"null": _is_null(one, other), "tasks": _common(*grades) or _common(_by_task(one), _by_task(other))}
        found.append(entry)
        if reason := _invalid(suite, one, other):
            entry |= {"verdict": "invalid", "reason": reason}
            continue
        if reason := _same_runs(one, other):
            entry |= {"verdict": "missing", "reason": reason}
            continue
        try:
            measured.append((entry, inference.difference(*grades), *grades))
        except ConfigError as e:
            entry |= {"verdict": "missing", "reason": str(e)}
    corrected = inference.holm([d.p for _, d, _, _ in measured])
    for (entry, d, mine, theirs), p in zip(measured, corrected, strict=True):
        alpha = ALPHA / len(measured)
        chance = inference.power(suite.effect, d, alpha=alpha)
        entry |= {
            "difference": d.estimate,
            "low": d.low,
            "high": d.high,
            "p": d.p,
            "p_holm": p,
            "seeds": d.seeds,
            "items": d.items,
            "by_seed": list(d.by_seed),
            "probability_of_improvement": inference.probability_of_improvement(mine, theirs),
            "power": chance,
            "more_seeds": None,
            "item_error": math.sqrt(d.item_variance),
            "verdict": _verdict(d, p, chance, suite.effect, alpha),
        }
        if entry["verdict"] == "underpowered":
            entry["more_seeds"] = inference.more_seeds(suite.effect, d, alpha=alpha)
    return found


def _pairs(suite: Suite, arms: Sequence[Mapping[str, Any]]) -> Iterator[tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]]:
    """The rows of two arms on tasks that have one budget, for every comparison."""
    for amount in dict.fromkeys(suite.budgets.values()):
        rows: dict[str, list[Mapping[str, Any]]] = {}
        for a in arms:
            if suite.budgets[a["task"]] == amount:
                rows.setdefault(a["name"], []).append(a)
        strategies = [n for n, r in rows.items() if r[0]["kind"] == "strategy"]
        strategies.sort(key=lambda n: any(a["of"] for a in rows[n]))  # one that is a null arm of others as well is what they are compared with
        for number, one in enumerate(strategies, 1):
            yield from ((rows[one], rows[other]) for other in rows if other not in strategies[:number] and _meet(rows[one], rows[other]))


def _verdict(d: Difference, p: float, chance: float, effect: float, alpha: float) -> str:
    """What a comparison says. Args: p: corrected for the number of comparisons, as the level `alpha` of the interval is."""
    if p < ALPHA:
        return "better" if d.estimate > 0 else "worse"
    low, high = d.interval(alpha)
    if -effect < low and high < effect:
        return "no difference"
    return "underpowered" if chance < POWER else "not shown"


def _meet(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> bool:
    """Whether two arms share a task, and the other, if it is the null arm of some strategies, is one of the first's."""
    common = {a["task"] for a in one} & {b["task"] for b in other}
    return bool(common) and all(b["kind"] == "strategy" or not b["of"] or one[0]["name"] in b["of"] for b in other)


def _is_null(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a strategy has to beat the other arm: a null arm, or a strategy that is configured as one of its null arms is."""
    return all(b["kind"] not in ("strategy", "supervised") or one[0]["name"] in b["of"] for b in other)


def _invalid(suite: Suite, one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> str | None:
    """Why two arms may not be compared, or None: trained arms spend their budget and the same, an untrained one may spend less."""
    rows = _by_task(other)
    pairs = [(a, rows[a["task"]]) for a in one if a["task"] in rows]
    for a, b in pairs:
        reasons = [_beyond(suite, a), _beyond(suite, b), _apart(suite, a, b)]
        if reason := next(filter(None, reasons), None):
            return reason
    return None


def _beyond(suite: Suite, a: Mapping[str, Any]) -> str | None:
    """How far a trained arm spent more than it was given, or None where it did not."""
    budget = suite.budgets[a["task"]]
    if not a["trained"] or a["spent"] is None or a["spent"] <= budget * (1 + suite.tolerance):
        return None
    return (
        f"{a['name']} spent {a['spent']:.3g} {suite.unit} on {a['task']} and was given {budget:.3g}, more than {suite.tolerance:.0%} beyond; "
        "give a larger budget, or make its rounds smaller"
    )


def _apart(suite: Suite, a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    """How far apart the spending of a strategy and of another arm is, or None where that may be."""
    if a["spent"] is None or b["spent"] is None or (b["spent"] <= a["spent"] and not b["trained"]):
        return None
    less, more = sorted((a["spent"], b["spent"]))
    if more <= less * (1 + suite.tolerance):
        return None
    return (
        f"they did not spend the same on {a['task']}: {a['name']} {a['spent']:.3g} and {b['name']} {b['spent']:.3g} {suite.unit}, "
        f"more than {suite.tolerance:.0%} apart"
    )


RANDOM = {"random_reward": "exchanging the rewards of a round", "random_edits": "exchanging the texts of a round's edits"}
"""The null arms that are made of a strategy, and what makes them random."""


def _same_runs(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a random arm says nothing of its strategy, or None: where every seed did the same, it was not random."""
    rows = _by_task(other)
    pairs = [(mine, its) for a in one if a["task"] in rows for mine in a["cells"] for its in rows[a["task"]]["cells"] if mine["seed"] == its["seed"]]
    digests = [(mine.get("lineage_digest"), its.get("lineage_digest")) for mine, its in pairs if mine["per_item"] and its["per_item"]]
    if other[0]["kind"] not in RANDOM or not digests or not all(mine and mine == its for mine, its in digests):
        return None
    return f"in every seed the null arm did what the strategy did: {RANDOM[other[0]['kind']]} changes nothing here"


def _common(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [task for task in one if task in other]


def _by_task(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {a["task"]: a for a in rows}


def _grades(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, dict[str, float]]]:
    return {a["task"]: graded for a in rows if (graded := {c["seed"]: c["per_item"] for c in a["cells"] if c["per_item"]})}
