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
        common = [a["task"] for a in one if a["task"] in {b["task"] for b in other}]
        entry: dict[str, Any] = {"one": one[0]["name"], "other": other[0]["name"], "kind": other[0]["kind"], "tasks": common}
        found.append(entry)
        if reason := _invalid(suite, one, other):
            entry |= {"verdict": "invalid", "reason": reason}
            continue
        try:
            grades = _grades(one), _grades(other)
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
            "verdict": _verdict(d, p, chance, suite.effect),
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
        for number, one in enumerate(strategies, 1):
            yield from ((rows[one], rows[other]) for other in rows if other not in strategies[:number] and _meet(rows[one], rows[other]))


def _verdict(d: Difference, p: float, chance: float, effect: float) -> str:
    if p < ALPHA:
        return "better" if d.estimate > 0 else "worse"
    if -effect < d.low and d.high < effect:
        return "no difference"
    return "underpowered" if chance < POWER else "not shown"


def _meet(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> bool:
    """Whether two arms share a task, and the other, if it is the null arm of some strategies, is one of the first's."""
    common = {a["task"] for a in one} & {b["task"] for b in other}
    return bool(common) and all(not b["of"] or one[0]["name"] in b["of"] for b in other)


def _invalid(suite: Suite, one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> str | None:
    """Why two arms may not be compared, or None: trained arms spend the same, an untrained one may spend less."""
    for a in one:
        for b in other:
            if a["task"] != b["task"] or not a["spent"] or b["spent"] is None:
                continue
            ratio = a["spent"] / b["spent"] if b["spent"] else math.inf
            most = 1 + suite.tolerance
            if ratio > most and not b["trained"]:
                continue
            if not 1 / most <= ratio <= most:
                return (
                    f"they did not spend the same on {a['task']}: {a['name']} {a['spent']:.3g} and {b['name']} {b['spent']:.3g} {suite.unit}, "
                    f"more than {suite.tolerance:.0%} apart"
                )
    return None


def _grades(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, dict[str, float]]]:
    return {a["task"]: graded for a in rows if (graded := {c["seed"]: c["per_item"] for c in a["cells"] if c["per_item"]})}
