"""What `dgm_repair.py` says of its finished runs: sealed scores, paired differences, the papers' order of arms, costs and curves.

A run folder holds ``journal.jsonl`` and, once it is done, ``sealed.json``; everything here is read from these two. Intervals and p are those of
`selfimprove.bench.inference`: differences are paired by seed and function, seeds are drawn and keep their functions, and functions that seeds
share are drawn too. With one seed only functions are drawn, which says nothing about another seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import beta

from selfimprove import journal
from selfimprove.bench import inference
from selfimprove.bench.inference import ALPHA
from selfimprove.records import Candidate, Lineage
from selfimprove_dgm import Archive

SEALED = "sealed.json"
CLAIMS = (
    ("dgm", "greedy", "50.0 and 39.7 on SWE-bench, DGM's table"),
    ("dgm", "no_self_modification", "50.0 and 39.0 on SWE-bench, DGM's table"),
    ("dgm", "no_archive", "50.0 and 23.0 on SWE-bench, DGM's table"),
    ("greedy", "no_archive", "39.7 and 23.0 on SWE-bench, DGM's table"),
    ("no_self_modification", "no_archive", "39.0 and 23.0 on SWE-bench, DGM's table"),
    ("hgm", "dgm", "56.7 and 53.3 on 60 tasks of SWE-Verified, HGM's table"),
)
"""Pairs of arms of which the papers (Zhang et al. 2025, Wang et al. 2025) have the first above the second, and their numbers."""
COSTS = ("evaluations", "cpu_seconds")
"""The first two columns of a curve: evaluations of single functions, and processor seconds in the sandbox, where a program that was remembered
counts with what it cost when it ran."""

Grades = Mapping[int, Mapping[str, float]]
"""Sealed grades by seed and function."""


@dataclass(frozen=True)
class Finished:
    """One run that has opened its sealed functions."""

    arm: str
    seed: int
    sealed: Mapping[str, Any]
    """``initial`` and ``best`` as encoded evaluations, the best agent's ``candidate``, and the ``commit`` that measured them."""
    curve: Sequence[Sequence[float]]
    """After each round: evaluations, processor seconds, the best agent's share of training functions. (rounds, 3)"""

    @property
    def name(self) -> str:
        return f"{self.arm}_s{self.seed}"


def finished(folder: Path, arm: str, seed: int) -> Finished | None:
    """A run as its folder tells it; None where it is not done."""
    path = folder / SEALED
    return Finished(arm, seed, json.loads(path.read_text()), curve(folder)) if path.exists() else None


def curve(folder: Path) -> list[list[float]]:
    """After each round: evaluations of single functions, processor seconds, the best agent's share of training functions.  (rounds, 3)"""
    lineage, _, _ = journal.read(folder / "journal.jsonl")
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()[1:]]
    points, evaluations, view, archive = [], 0, Lineage(lineage.root), Archive()
    for i, line in enumerate(lines):
        view = view + lineage.round(i)
        evaluations += sum(max(1, len(e.per_item)) for _, e in lineage.round(i).scores if e.score is not None)
        spent = line.get("ledger", {}).get("totals", {}).get("cpu_seconds", 0.0)
        points.append([float(evaluations), round(float(spent), 2), float(view.score(best(view, archive).id) or 0.0)])
    return points


def best(lineage: Lineage, archive: Archive | None = None) -> Candidate:
    """The agent that is the best with the most certainty, the oldest of equals, and none that ever tampered with a measurement.

    It has the highest 5 % quantile of Beta(1 + solved, 1 + failed), as the agent that HGM returns (Wang et al. 2025): a lucky score on ten
    functions is less than nearly the same on sixty.
    """
    archive = (archive or Archive()).follow(lineage)
    won, lost, void = (archive.column(n) for n in ("won", "lost", "void"))  # (N,) each
    return lineage[archive.ids[int(np.argmax(np.where(void > 0, -1.0, beta.ppf(0.05, 1 + won, 1 + lost))))]]


def result(runs: Sequence[Finished]) -> dict[str, Any]:
    """Everything that is said of the runs."""
    names = list(dict.fromkeys(r.arm for r in runs))
    grades = {arm: {which: _grades(runs, arm, which) for which in ("initial", "best")} for arm in names}
    arms: dict[str, Any] = {}
    for arm, found in grades.items():
        if not found["best"]:
            continue
        twice = {s: {i: 2 * g for i, g in row.items()} for s, row in found["initial"].items()}
        arms[arm] = {
            **{which: level(found[which]) for which in ("initial", "best")},
            "gain": difference(found["best"], found["initial"]),
            "above_twice_the_initial": difference(found["best"], twice),
            "cost": {c: float(np.mean([r.curve[-1][k] for r in runs if r.arm == arm])) for k, c in enumerate(COSTS)},
        }
    corrected(a["gain"] for a in arms.values())
    differences = {f"dgm_vs_{arm}": difference(grades["dgm"]["best"], grades[arm]["best"]) for arm in arms if arm != "dgm" and "dgm" in arms}
    corrected(differences.values())
    return {
        "arms": arms,
        "differences": differences,
        "ordering": ordering({arm: grades[arm]["best"] for arm in arms}),
        "doubled": [doubled(arm, a) for arm, a in arms.items()],
        "at_equal_cost": {c: at_equal_cost(runs, k) for k, c in enumerate(COSTS)},
        "void": {r.name: r.sealed["best"]["error"] for r in runs if r.sealed["best"]["score"] is None},
        "runs": {r.name: {**r.sealed, "curve": r.curve} for r in runs},
    }


def _grades(runs: Iterable[Finished], arm: str, which: str) -> Grades:
    return {r.seed: r.sealed[which]["per_item"] for r in runs if r.arm == arm and r.sealed[which].get("per_item")}


# ---- intervals ----


def level(grades: Grades) -> dict[str, Any]:
    """A mean sealed score and its 95 % interval, which stays a share."""
    found = difference(grades, {s: dict.fromkeys(row, 0.0) for s, row in grades.items()})
    return {**{k: found[k] for k in ("score", "seeds", "functions")}, **{k: min(1.0, max(0.0, found[k])) for k in ("low", "high")}}


def difference(one: Grades, other: Grades) -> dict[str, Any]:
    """The mean of one minus another, paired by seed and function, with its 95 % interval; p where there is more than one seed."""
    common = [s for s in one if s in other]
    if len(common) > 1:
        d = inference.difference({"repair": one}, {"repair": other})
        return {"score": d.estimate, "low": d.low, "high": d.high, "p": d.p, "seeds": d.seeds, "functions": d.items, "by_seed": list(d.by_seed)}
    x = np.array([one[s][i] - other[s][i] for s in common for i in one[s] if i in other[s]])  # (functions,)
    drawn = x[np.random.default_rng(0).integers(len(x), size=(10_000, len(x)))].mean(axis=1)  # (draws,)
    low, high = np.percentile(drawn, [100 * ALPHA / 2, 100 - 100 * ALPHA / 2])
    return {"score": float(x.mean()), "low": float(low), "high": float(high), "seeds": len(common), "functions": len(x)}


def corrected(found: Iterable[dict[str, Any]]) -> None:
    """Give each difference that has a p its ``p_holm``, corrected for how many there are."""
    tested = [d for d in found if "p" in d]
    for d, p in zip(tested, inference.holm([d["p"] for d in tested]), strict=True):
        d["p_holm"] = p


# ---- what is said in words ----


def ordering(grades: Mapping[str, Grades]) -> dict[str, Any]:
    """The papers' order of arms, pair by pair, against what was measured."""
    claims = [
        {"above": a, "below": b, "paper": numbers, **difference(grades[a], grades[b])} for a, b, numbers in CLAIMS if a in grades and b in grades
    ]
    corrected(claims)
    for claim in claims:
        sure = claim.get("p_holm", 1.0) < ALPHA
        claim["verdict"] = ("as in the paper" if claim["score"] > 0 else "the reverse") if sure else "not decided"
    means = {arm: level(g)["score"] for arm, g in grades.items()}
    measured = sorted(means, key=lambda arm: -means[arm])
    counts = {v: sum(c["verdict"] == v for c in claims) for v in ("as in the paper", "the reverse", "not decided")}
    words = ["Measured, best first: " + ", ".join(f"{_called(a)} {means[a]:.3f}" for a in measured) + "."] if means else []
    if claims:
        words.append(
            f"Of the papers' {len(claims)} comparisons, {counts['as in the paper']} come out as in the paper, {counts['the reverse']} the other way "
            f"round, and {counts['not decided']} are not decided."
        )
    words += map(_sentence, claims)
    return {"claims": claims, "measured": measured, "words": words}


def _sentence(claim: Mapping[str, Any]) -> str:
    p = f", corrected p {claim['p_holm']:.2g}" if "p_holm" in claim else ""
    seeds = f"{claim['seeds']} seed{'s' if claim['seeds'] != 1 else ''}"
    return (
        f"{_called(claim['above'])} above {_called(claim['below'])} ({claim['paper']}): {claim['verdict']}, "
        f"{claim['score']:+.3f} [{claim['low']:+.3f}, {claim['high']:+.3f}], {seeds}{p}."
    )


def doubled(arm: str, found: Mapping[str, Any]) -> str:
    """Whether the best agent of an arm solves at least twice as much as the initial one."""
    one, two, over = found["best"]["score"], found["initial"]["score"], found["above_twice_the_initial"]
    sure = "and the interval of the difference to twice the initial score is above 0" if over["low"] > 0 else "which the interval leaves open"
    return f"{_called(arm)}: {one:.3f} from {two:.3f}, " + (f"at least twice as much, {sure}." if one >= 2 * two else "less than twice as much.")


def _called(arm: str) -> str:
    names = {
        "dgm": "DGM",
        "hgm": "HGM",
        "no_self_modification": "DGM without self-modification",
        "no_archive": "DGM without an archive",
        "greedy": "greedy selection",
        "random": "random selection",
    }
    return names.get(arm, arm)


# ---- curves ----


def at_equal_cost(runs: Sequence[Finished], column: int) -> dict[str, Any]:
    """The best agents' share of training functions where every run had spent as much as the one that spent the least in all.

    Of training functions, among which the best was chosen, so it flatters; it says how fast arms rise, not how high.
    """
    if not runs:
        return {}
    budget = min(r.curve[-1][column] for r in runs)
    names = dict.fromkeys(r.arm for r in runs)
    return {"budget": budget, "scores": {a: float(np.mean([reached(r.curve, column, budget) for r in runs if r.arm == a])) for a in names}}


def reached(points: Sequence[Sequence[float]], column: int, budget: float) -> float:
    """The third column of a curve where another one had last been within a budget; that of its first point before."""
    return [p for i, p in enumerate(points) if i == 0 or p[column] <= budget][-1][2]


def plot(runs: Sequence[Finished], arms: Sequence[str], path: Path) -> None:
    """The curves of all runs, thin, and each arm's mean over seeds as far as all of its runs went."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    labels = ("evaluations of single functions", "processor seconds in the sandbox")
    for column, (axis, label) in enumerate(zip(axes, labels, strict=True)):
        axis.set(xlabel=label)
        for arm in dict.fromkeys(r.arm for r in runs):
            mine = [r.curve for r in runs if r.arm == arm]
            colour = f"C{list(arms).index(arm)}"
            for points in mine:
                axis.step([p[column] for p in points], [p[2] for p in points], where="post", color=colour, alpha=0.25, linewidth=0.8)
            _mean(axis.step, mine, column, colour, arm.replace("_", " "))
    axes[0].set_ylabel("best agent, training functions")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _mean(step: Callable[..., Any], curves: Sequence[Sequence[Sequence[float]]], column: int, colour: str, label: str) -> None:
    last = min(points[-1][column] for points in curves)
    xs = sorted({p[column] for points in curves for p in points if p[column] <= last})
    step(xs, [np.mean([reached(points, column, x) for points in curves]) for x in xs], where="post", color=colour, label=label)
