"""DGM and HGM against their ablations on program repair. Resumable: run it again after a kill.

    python benchmarks/dgm_repair.py --seeds 0 1 2
    python benchmarks/dgm_repair.py --arms dgm greedy --children 20 --minutes 8

Every arm makes as many children, on the same training functions, and opens the sealed functions at its end, once, for the initial agent
and for the best one: the agent with the highest (solved + 1) / (measured + 2) on the training functions, so that one lucky task does not make
an agent the best. With --ranking uniform (the default) nobody weighs the changes of the grammar, and no model is opened; --ranking model lets
the embedded model weigh them. Intervals are 95 % bootstraps over sealed functions, those of all seeds together; differences are paired by seed
and function. The result is benchmarks/results/dgm_repair.json and .svg; run folders stay under --work.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _machine import RESULTS, commit, versions

from selfimprove import config, journal
from selfimprove.hooks import hookimpl
from selfimprove.records import Candidate, Lineage, encode_evaluation
from selfimprove.session import Session
from selfimprove.storage import write_json
from selfimprove_dgm import Archive

ARMS = {
    "dgm": ["strategy=dgm"],
    "hgm": ["strategy=hgm"],
    "no_self_modification": ["strategy=dgm", "editor.author=root"],
    "no_archive": ["strategy=dgm", "selector=no_archive"],
    "greedy": ["strategy=dgm", "selector=greedy"],
    "random": ["strategy=dgm", "selector=uniform"],
}
SEALED = "sealed.json"


class Until:
    """A guard: so many children were tried, or the time of this call is over."""

    def __init__(self, children: int, end: float) -> None:
        self.children, self.end = children, end

    @hookimpl
    def should_stop(self, lineage: Lineage) -> str | None:
        if tried(lineage) >= self.children:
            return f"{self.children} children were tried"
        return "the time of this call is over" if time.monotonic() > self.end else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=[*ARMS], default=[*ARMS])
    parser.add_argument("--children", type=int, default=80)
    parser.add_argument("--ranking", choices=["uniform", "model"], default="uniform")
    parser.add_argument("--test", type=int, default=50, help="sealed functions")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop starting rounds after this long")
    parser.add_argument("--work", type=Path, default=Path("runs", "dgm_repair"))
    parser.add_argument("--out", type=Path, default=RESULTS / "dgm_repair.json")
    parser.add_argument("overrides", nargs="*", help="configuration overrides of every run")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    for seed in options.seeds:
        for arm in options.arms:
            if time.monotonic() < end:
                grown(options, arm, seed, end)
    report(options)


def parts_of(options: argparse.Namespace, arm: str, seed: int) -> Any:
    ranking = ["editor.ranking=uniform", "engine=scripted"] if options.ranking == "uniform" else ["editor.ranking=model"]
    sizes = [f"task.seed={seed}", f"seed={seed}", f"task.test={options.test}"]
    return config.build(config.compose([*ARMS[arm], *ranking, *sizes, *options.overrides]))


def folder_of(options: argparse.Namespace, arm: str, seed: int) -> Path:
    return Path(options.work, f"{arm}_s{seed}_{options.ranking}_c{options.children}")


def grown(options: argparse.Namespace, arm: str, seed: int, end: float) -> None:
    """Grow a run as far as the time allows, and measure its sealed functions when it is done."""
    folder = folder_of(options, arm, seed)
    if (folder / SEALED).exists():
        return
    parts = parts_of(options, arm, seed)
    session = Session(watched(parts, [Until(options.children, end)]), folder)
    lineage = session.improve()
    print(f"{folder.name}: {tried(lineage)} children, {lineage.size} agents")
    if tried(lineage) >= options.children:
        write_json(folder / SEALED, sealed(parts, folder))


def watched(parts: Any, observers: Sequence[Any]) -> Any:
    return dataclasses.replace(parts, observers=list(observers))


def sealed(parts: Any, folder: Path) -> dict[str, Any]:
    """The sealed scores of the initial and of the best agent, by function."""
    session = Session(watched(parts, [Until(0, 0.0)]), folder, evaluation_split="test")
    try:
        lineage = session.lineage
        chosen = best(lineage)
        candidates = list({c.id: c for c in (lineage.root, chosen)}.values())
        scores = dict(session.hook.evaluate(candidates=candidates, trials=[], rewards=[], lineage=lineage, run=session.run))
    finally:
        session.close()
    return {
        "initial": encode_evaluation(scores[lineage.root.id]),
        "best": encode_evaluation(scores[chosen.id]),
        "candidate": chosen.id,
        "commit": commit(),
    }


def tried(lineage: Lineage) -> int:
    return sum(len(lineage.round(i).trials) for i in range(len(lineage)))


def best(lineage: Lineage) -> Candidate:
    """The agent with the highest (solved + 1) / (measured + 2), the oldest of equals."""
    archive = Archive().follow(lineage)
    won, lost = archive.column("won"), archive.column("lost")
    return lineage[archive.ids[int(np.argmax((won + 1) / (won + lost + 2)))]]


# ---- what came out ----


def report(options: argparse.Namespace) -> None:
    """Write the result of everything that has been measured so far, and print its arms."""
    measured: dict[str, dict[str, dict[str, list[float]]]] = {}
    runs: dict[str, Any] = {}
    for arm in options.arms:
        for seed in options.seeds:
            folder = folder_of(options, arm, seed)
            if not (folder / SEALED).exists():
                continue
            found = json.loads((folder / SEALED).read_text())
            runs[f"{arm}_s{seed}"] = {**found, "curve": curve(folder)}
            for which in ("initial", "best"):
                for item, value in found[which].get("per_item", {}).items():
                    measured.setdefault(arm, {}).setdefault(which, {}).setdefault(f"{seed}/{item}", []).append(value)
    arms = {arm: {which: interval(items) for which, items in found.items()} for arm, found in measured.items()}
    paired = {
        f"dgm_vs_{arm}": difference(measured["dgm"]["best"], found["best"]) for arm, found in measured.items() if arm != "dgm" and "dgm" in measured
    }
    result = {
        "arms": arms,
        "differences": paired,
        "runs": runs,
        "command": sys.argv[1:],
        "ranking": options.ranking,
        "commit": commit(),
        "versions": versions(),
    }
    write_json(options.out, result)
    for arm, found in arms.items():
        shown = (f"{w} {found[w]['score']:.3f} [{found[w]['low']:.3f}, {found[w]['high']:.3f}]" for w in ("initial", "best"))
        print(f"{arm:22s}", *shown)
    if runs:
        plot(runs, options.out.with_suffix(".svg"))


def curve(folder: Path) -> list[list[float]]:
    """After each round: evaluations of single functions, processor seconds in the sandbox, the best agent's share of training functions."""
    lineage, _, _ = journal.read(folder / "journal.jsonl")
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()[1:]]
    points, evaluations, view = [], 0, Lineage(lineage.root)
    for i, line in enumerate(lines):
        view = view + lineage.round(i)
        evaluations += sum(max(1, len(e.per_item)) for _, e in lineage.round(i).scores if e.score is not None)
        spent = line.get("ledger", {}).get("totals", {}).get("cpu_seconds", 0.0)
        points.append([float(evaluations), round(float(spent), 2), float(view.score(best(view).id) or 0.0)])
    return points


def interval(items: Mapping[str, Sequence[float]], draws: int = 10_000) -> dict[str, float]:
    """The mean over functions and its 95 % bootstrap interval."""
    x = np.array([np.mean(v) for v in items.values()])
    low, high = np.percentile(x[np.random.default_rng(0).integers(len(x), size=(draws, len(x)))].mean(axis=1), [2.5, 97.5])
    return {"score": float(x.mean()), "low": float(low), "high": float(high), "functions": float(len(x))}


def difference(one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean difference, paired by seed and function."""
    return interval({i: [float(np.mean(one[i]) - np.mean(other[i]))] for i in one if i in other})


def plot(runs: Mapping[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    colours = {arm: f"C{i}" for i, arm in enumerate(ARMS)}
    for name, run in runs.items():
        arm = name.rpartition("_s")[0]
        points = np.array(run["curve"])
        for axis, column in zip(axes, (0, 1), strict=True):
            axis.plot(points[:, column], points[:, 2], color=colours[arm], label=arm, alpha=0.8)
    axes[0].set(xlabel="evaluations of single functions", ylabel="best agent, training functions")
    axes[1].set(xlabel="processor seconds in the sandbox")
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    axes[1].legend(handles.values(), handles.keys(), fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
