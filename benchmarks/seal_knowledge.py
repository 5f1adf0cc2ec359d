"""SEAL against its null arms on people, or passages, that it was never trained on. Resumable: run it again after a kill.

    python benchmarks/seal_knowledge.py                       # invented people, 1 seed
    python benchmarks/seal_knowledge.py --seeds 0 1 2 --train 60 --test 60 engine.device=cuda
    python benchmarks/seal_knowledge.py --squad PATH          # passages of a SQuAD-shaped file

For each seed it trains `strategy=seal` and `strategy=seal_tools` (train split only), then opens the sealed test split in a
process of its own and measures every arm there: the root under the null arms, and the model after each round. Several processes with
one --work can take a seed each (`--seeds 0`, `--seeds 1`, …); the same command with all seeds then only reports. The result is
benchmarks/results/seal_knowledge.json (seal_squad.json with --squad); run folders stay under --work.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _machine import arguments, commit, describe, versions

from selfimprove import journal
from selfimprove.records import Part
from selfimprove.statistics import reward_statistics
from selfimprove.storage import write_json
from selfimprove_seal.evaluate import ARMS

HERE = Path(__file__).parent
COMPARISONS = {
    "seal_vs_edits": ("seal", "edits"),
    "seal_vs_passage": ("seal", "passage"),
    "seal_vs_passage_equal_tokens": ("seal", "passage_equal_tokens"),
    "seal_vs_round_1": ("seal", "round_1"),
    "round_1_vs_edits": ("round_1", "edits"),
}
SQUAD = (  # questions of a passage ask about its topic (as the paper's prompt does), and sentences and answers are longer than a biography's
    'editor.inner.question="Topic: {title}. Question: {question} Answer:"',
    "editor.inner.answer_tokens=24",
    "editor.max_tokens=72",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--train", type=int, default=20, help="training contexts per round")
    parser.add_argument("--edits", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--test", type=int, default=40, help="sealed contexts")
    parser.add_argument("--tools-train", type=int, default=4, help="training contexts per round of seal_tools; 0 leaves it out")
    parser.add_argument("--squad", type=Path, default=None)
    parser.add_argument("--work", type=Path, default=None, help="run folders; runs/seal_knowledge or runs/seal_squad")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--measure", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--last", action="store_true", help="measure only the last round's candidate; without it, later, the others too")
    parser.add_argument("overrides", nargs="*", help="configuration overrides of every run")
    options = arguments(parser)
    if options.measure:
        measure(options.measure, options.last)
        return
    if options.squad and len(options.seeds) > 1:
        parser.error("--squad takes one seed: splits of one file would share passages")
    name = "seal_squad" if options.squad else "seal_knowledge"
    options.work = options.work or Path("runs", name)
    options.out = options.out or HERE / "results" / f"{name}.json"
    plan = {"seal": options.train, "seal_tools": options.tools_train}
    folders = {s: [options.work / f"{s}_s{seed}" for seed in options.seeds] for s, contexts in plan.items() if contexts}
    for strategy, runs in folders.items():
        for seed, folder in zip(options.seeds, runs, strict=True):
            train(folder, [f"strategy={strategy}", f"editor.contexts={plan[strategy]}", *_task(options, seed), *options.overrides])
            if any(not piece(folder, job).exists() for job in jobs(folder, options.last)):
                subprocess.run([sys.executable, __file__, "--measure", str(folder), *(["--last"] if options.last else [])], check=True)
        report(options, folders)


def report(options: argparse.Namespace, folders: Mapping[str, Sequence[Path]]) -> None:
    """Write the result of everything that has been measured so far, and print its arms."""
    seeds = [{s: _measured(runs[i]) for s, runs in folders.items() if (runs[i] / "test").exists()} for i in range(len(options.seeds))]
    found = result(options, seeds)
    write_json(options.out, found)
    for name, arm in found["arms"].items():
        print(f"{name:28s} {arm['accuracy']:.3f} ± {arm['standard_error']:.3f}")
    for name, c in found["comparisons"].items():
        print(f"{name:28s} {c['difference']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]")


def train(folder: Path, overrides: Sequence[str], tiles: Path | None = None) -> None:
    """Start the run, or go on with it, as a user would. Args: tiles: where runs find one another's finished tiles."""
    if (folder / "test").exists():
        return  # finished, and being measured
    command = ["resume", str(folder)] if (folder / "config.yaml").exists() else ["run", *overrides, f"run.folder={folder}"]
    command += [] if tiles is None else ["--tiles", str(tiles.absolute())]
    subprocess.run([sys.executable, "-m", "selfimprove.cli", *command], check=True)


def jobs(folder: Path, only_last: bool) -> dict[str, tuple[str, Part]]:
    """What is measured of a finished run: the arm and the policy, by name. A round without a child leaves the policy as it was."""
    lineage, _, _ = journal.read(folder / "journal.jsonl")
    root = policy = lineage.root.parts["policy"]
    after = {}
    for i in range(len(lineage)):
        policy = lineage.round(i).children[-1].parts["policy"] if lineage.round(i).children else policy
        after[f"round_{i + 1}"] = ("edits", policy)
    if folder.name.startswith("seal_tools"):  # the other arms are the same as strategy=seal's
        return {"seal": ("edits", policy)} | ({} if only_last else {"edits": ("edits", root), **after})
    return {"seal": ("edits", policy)} | {arm: (arm, root) for arm in ARMS} | ({} if only_last else after)


def piece(folder: Path, job: str) -> Path:
    return folder / "test" / f"{job}.json"


def measure(folder: Path, only_last: bool) -> None:
    """Open the sealed split and measure what has not been measured of a finished run, each job into a file of its own."""
    import torch

    from selfimprove import config, session

    composed = config.load(folder / "config.yaml")
    opened = session.Session(config.build(composed), folder, evaluation_split="test")
    run, lineage = opened.run, opened.lineage
    engine = {k: v for k, v in {**composed.values["engine"], **run.models.engine.key}.items() if k != "_target_"}
    about = {"commit": commit(), "machine": {**describe(torch.device(engine.get("device", "cpu"))), "engine": engine}}
    wanted = jobs(folder, only_last)
    done = {job: piece(folder, name) for name, job in wanted.items() if piece(folder, name).exists()}
    for name, (arm, policy) in wanted.items():
        if piece(folder, name).exists():
            continue
        if (arm, policy) in done:  # the last round's policy is SEAL's, and so is that of a round without a child
            write_json(piece(folder, name), json.loads(done[arm, policy].read_text()))
            continue
        print(f"{folder.name}: measuring {name} on {len(run.task.evaluation)} sealed contexts", flush=True)
        before = run.ledger.totals["trained_tokens"]
        with run.stage("evaluate", 1):
            graded = run.roles["evaluator"].measure(run, arm, policy, writer=wanted["seal"][1])
        write_json(piece(folder, name), {"per_item": graded, "trained_tokens": run.ledger.totals["trained_tokens"] - before, **about})
        done[arm, policy] = piece(folder, name)
        run.models.retain([c.parts["policy"] for c in lineage if c.id != lineage.root.id])


def _measured(folder: Path) -> dict[str, Any]:
    """What is known of a run: its arms on the test split, its rounds and what training spent."""
    lineage, ledger, _ = journal.read(folder / "journal.jsonl")
    rounds = []
    for i in range(len(lineage)):
        one = lineage.round(i)
        measured = [r.score for r in one.rewards if r.score is not None]
        rounds.append(
            {
                "mean_reward": float(np.mean(measured)) if measured else None,
                "unmeasurable": len(one.rewards) - len(measured),
                **reward_statistics(one.trials, one.rewards),
            }
        )
    pieces = {p.stem: json.loads(p.read_text()) for p in sorted((folder / "test").glob("*.json"))}
    trained_at = json.loads((folder / "versions.json").read_text())["git"]
    return {
        "arms": {n: p["per_item"] for n, p in pieces.items()},
        "trained_tokens": {n: p["trained_tokens"] for n, p in pieces.items()},
        "rounds": rounds,
        "ledger": ledger.get("totals", {}),
        "config": (folder / "config.yaml").read_text(),
        "commits": sorted({str(c) for c in (trained_at, *(p["commit"] for p in pieces.values()))}),
        "machines": [p["machine"] for p in pieces.values()],
    }


def result(options: argparse.Namespace, seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The committed JSON: arms pooled over seeds, paired comparisons, and how it was made."""
    arms: dict[str, dict[str, float]] = {}
    for seed, runs in zip(options.seeds, seeds, strict=True):
        for strategy, run in runs.items():
            for name, measured in run["arms"].items():
                arm = name if strategy == "seal" else "seal_tools" if name == "seal" else f"seal_tools_{name}"
                arms.setdefault(arm, {}).update({f"s{seed}/{q}": g for q, g in measured.items()})
    runs = [r for found in seeds for r in found.values()]
    machines = list({json.dumps(m): m for r in runs for m in r["machines"]}.values())
    return {
        "arms": {n: {**summary(g), "per_item": g} for n, g in arms.items()},
        "comparisons": {n: difference(arms[a], arms[b]) for n, (a, b) in COMPARISONS.items() if {a, b} <= set(arms)},
        "rounds": [{s: r["rounds"] for s, r in runs.items()} for runs in seeds],
        "trained_tokens_on_test": [{s: r["trained_tokens"] for s, r in runs.items()} for runs in seeds],
        "ledger": [{s: r["ledger"] for s, r in runs.items()} for runs in seeds],
        "config": {s: _portable(r["config"], options) for s, r in seeds[0].items()},
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
        "commit": commit(),
        "commits": sorted({c for r in runs for c in r["commits"]}),
        "versions": versions(),
        "machine": machines[0] if len(machines) == 1 else machines,
    }


def _portable(text: str, options: argparse.Namespace) -> str:
    """A configuration without the folders of this machine."""
    for path in (options.squad, options.work):
        text = text.replace(str(path.absolute()), path.name) if path else text
    return text


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


def summary(graded: Mapping[str, float]) -> dict[str, float]:
    """Accuracy, its standard error over contexts, and the number of questions."""
    clusters: dict[str, list[float]] = {}
    for q, g in graded.items():
        clusters.setdefault(q.rpartition("/")[0], []).append(g)
    accuracy = sum(graded.values()) / len(graded)
    spread = sum((sum(c) - len(c) * accuracy) ** 2 for c in clusters.values())
    error = (spread * len(clusters) / max(1, len(clusters) - 1)) ** 0.5 / len(graded)
    return {"accuracy": accuracy, "standard_error": error, "questions": len(graded), "contexts": len(clusters)}


def _task(options: argparse.Namespace, seed: int) -> list[str]:
    contexts = max(options.train, options.tools_train) * options.rounds
    sizes = [f"task.train={contexts}", "task.validation=4", f"task.test={options.test}", f"task.seed={seed}"]
    task = ["task=squad", f"task.path={options.squad}", *SQUAD] if options.squad else []
    return [*task, *sizes, "evaluator.arms=[edits]", f"editor.edits={options.edits}", f"guard.rounds.rounds={options.rounds}", f"seed={seed}"]


if __name__ == "__main__":
    main()
