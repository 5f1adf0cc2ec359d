"""What DGM's settings are worth on validation functions: its midpoint, its threshold, and which agent is called the best. Resumable.

    python benchmarks/dgm_exploration.py --seeds 10 11 12

The seeds are not those of `dgm_repair.py`, and the sealed functions, which all seeds share, stay closed. Each run makes as many children as there,
with nobody weighing the changes. From the measurements on training functions alone two agents are called the best, and both are measured on the
validation functions: ``mean`` has the highest (solved + 1) / (measured + 2), ``belief`` the highest 5 % quantile of Beta(1 + solved, 1 + failed),
as HGM chooses the agent that it returns (Wang et al. 2025). The result is benchmarks/results/dgm_exploration.json; run folders stay under --work.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
from _dgm_report import best
from _machine import RESULTS, arguments, commit, versions
from dgm_repair import Until, tried

from selfimprove import config
from selfimprove.records import Candidate, Lineage
from selfimprove.session import Session
from selfimprove.storage import write_json
from selfimprove_dgm import Archive

VARIANTS = {
    "dgm": ["strategy=dgm", "selector=dgm"],
    "top3": ["strategy=dgm", "selector=dgm_top3"],
    "top3_threshold": ["strategy=dgm", "selector=dgm_top3", "rewarder.threshold=0.2"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS], default=[*VARIANTS])
    parser.add_argument("--children", type=int, default=80)
    parser.add_argument("--work", type=Path, default=Path("runs", "dgm_exploration"))
    parser.add_argument("--out", type=Path, default=RESULTS / "dgm_exploration.json")
    parser.add_argument("overrides", nargs="*", help="configuration overrides of every run")
    options = arguments(parser)
    found: dict[str, dict[str, Any]] = {}
    for seed in options.seeds:
        for name in options.variants:
            found.setdefault(name, {})[str(seed)] = one = explored(options, name, seed)
            print(name, seed, one["validation"], one["measured"])
    means = {n: {w: float(np.mean([r["validation"][w] for r in rows.values()])) for w in ("initial", "mean", "belief")} for n, rows in found.items()}
    write_json(options.out, {"validation": means, "runs": found, "command": sys.argv[1:], "commit": commit(), "versions": versions()})
    for name, one in means.items():
        print(f"{name:16s}", *(f"{w} {v:.3f}" for w, v in one.items()))


def explored(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """One run: what its agents are worth on validation, and on how many training functions they were measured."""
    words = [*VARIANTS[name], "editor.ranking=uniform", "engine=scripted", f"task.seed={seed}", f"seed={seed}", *options.overrides]
    parts = dataclasses.replace(config.build(config.compose(words)), observers=[Until(options.children, float("inf"))])
    session = Session(parts, Path(options.work, f"{name}_s{seed}_c{options.children}"))
    lineage = session.improve()
    named = {"initial": lineage.root, "mean": likeliest(lineage), "belief": best(lineage)}
    opened = Session(parts, session.run.folder)
    try:
        different = list({c.id: c for c in named.values()}.values())
        scores = dict(opened.hook.evaluate(candidates=different, trials=[], rewards=[], lineage=lineage, run=opened.run))
    finally:
        opened.close()
    archive = Archive().follow(lineage)
    counts = {c.id: int(archive.column("won")[i] + archive.column("lost")[i]) for i, c in enumerate(lineage)}
    return {
        "validation": {w: scores[c.id].score for w, c in named.items()},
        "training": {w: lineage.score(c.id) for w, c in named.items()},
        "measured": {w: counts[c.id] for w, c in named.items()},
        "children": tried(lineage),
        "evaluations": sum(counts.values()),
    }


def likeliest(lineage: Lineage) -> Candidate:
    """The agent with the highest (solved + 1) / (measured + 2) that never tampered with a measurement, the oldest of equals."""
    archive = Archive().follow(lineage)
    won, lost, void = (archive.column(n) for n in ("won", "lost", "void"))  # (N,) each
    return lineage[archive.ids[int(np.argmax(np.where(void > 0, -1.0, (won + 1) / (won + lost + 2))))]]


if __name__ == "__main__":
    main()
