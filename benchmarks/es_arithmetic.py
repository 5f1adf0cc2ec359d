"""EGGROLL and ES against policy gradient with true labels, on products of small numbers, for equal cost. Resumable: run it again after a kill.

    python benchmarks/es_arithmetic.py --seeds 0 1 2
    python benchmarks/es_arithmetic.py --arms eggroll policy_gradient --flops 1e14 --tokens 50000

For each seed (questions of its own) and each table it trains one run per arm on the train split until its budget is spent: nominal FLOPs in the
table `flops`, generated tokens in the table `tokens`. All arms are rewarded by the same labels, and none is evaluated while it trains, so that all
of the budget is training's. Then it opens the sealed test split in a process of its own and measures the last candidate. The untrained arms are
the root: sampled at temperature 1, and at the temperature that is best on validation. Several processes with one --work can take a seed each. The
result is benchmarks/results/es_arithmetic.json and .svg; run folders stay under --work.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from _machine import RESULTS, commit, describe, versions
from seal_knowledge import difference, piece, train
from srt_arithmetic import answered, best_temperature, interval

from selfimprove import journal
from selfimprove.storage import write_json

TRAINED = {
    "es": ["strategy=es"],
    "eggroll": ["strategy=eggroll"],
    "policy_gradient": ["strategy=srt", "rewarder=verifier", "middleware=[]"],
}
UNTRAINED = ("untrained", "untrained_best_temperature")
UNITS = {"flops": "flops", "tokens": "generated_tokens"}
"""The ledger's unit that each table's budget is in."""
SAMPLES = 8
"""Answers to each question."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=[*TRAINED], default=[*TRAINED])
    parser.add_argument("--flops", type=float, default=3e14, help="budget of the table `flops`; 0 leaves it out")
    parser.add_argument("--tokens", type=int, default=150_000, help="budget of the table `tokens`; 0 leaves it out")
    parser.add_argument("--train", type=int, default=64, help="training questions")
    parser.add_argument("--test", type=int, default=48, help="sealed questions")
    parser.add_argument("--work", type=Path, default=Path("runs", "es_arithmetic"))
    parser.add_argument("--out", type=Path, default=RESULTS / "es_arithmetic.json")
    parser.add_argument("--measure", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="configuration overrides of every run; ARM:KEY=VALUE of one arm's")
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    for seed in options.seeds:
        for table in tables(options):
            for arm in options.arms:
                folder = options.work / f"{table}_{arm}_s{seed}"
                train(folder, settings(options, table, arm, seed))
                if any(not piece(folder, job).exists() for job in jobs(folder)):
                    subprocess.run([sys.executable, __file__, "--measure", str(folder)], check=True)
            report(options)


def tables(options: argparse.Namespace) -> dict[str, float]:
    """The budget of each table."""
    return {name: float(budget) for name in UNITS if (budget := getattr(options, name))}


def settings(options: argparse.Namespace, table: str, arm: str, seed: int) -> list[str]:
    """The overrides of one run."""
    sizes = [f"task.train={options.train}", "task.validation=12", f"task.test={options.test}", f"task.seed={seed}", f"seed={seed}"]
    budget = ["evaluator=none", "guard=[budget]", f"guard.budget.{UNITS[table]}={tables(options)[table]:g}"]
    own = [o.removeprefix(f"{arm}:") for o in options.overrides if o.startswith(f"{arm}:") or ":" not in o.partition("=")[0]]
    return [*TRAINED[arm], *sizes, *budget, *own]


def jobs(folder: Path) -> list[str]:
    """What is measured of a finished run: its last candidate and, with the policy gradient, the root."""
    arm = arm_of(folder)
    return [arm, *(UNTRAINED if arm == "policy_gradient" else ())]


def arm_of(folder: Path) -> str:
    return folder.name.partition("_")[2].rpartition("_s")[0]


def measure(folder: Path) -> None:
    """Open the sealed split and measure what has not been measured of a finished run, each job into a file of its own."""
    import torch

    from selfimprove import config, session
    from selfimprove.rollouts import PassAtK

    composed = config.load(folder / "config.yaml")
    composed.values["evaluator"] = {"_target_": "selfimprove.rollouts.PassAtK", "samples": SAMPLES, "greedy": False}
    best = best_temperature(folder, composed) if "untrained_best_temperature" in jobs(folder) else 1.0
    opened = session.Session(config.build(composed), folder, evaluation_split="test")
    run, lineage = opened.run, opened.lineage
    assert isinstance(run.roles["evaluator"], PassAtK)
    about = {"commit": commit(), "machine": {**describe(torch.device(run.models.engine.key["device"])), "engine": dict(run.models.engine.key)}}
    for name in jobs(folder):
        if piece(folder, name).exists():
            continue
        policy = (lineage.root if name in UNTRAINED else lineage.latest).parts["policy"]
        temperature = best if name == "untrained_best_temperature" else 1.0
        with run.stage("evaluate", 1):
            write_json(piece(folder, name), {**answered(run, policy, temperature), "temperature": temperature, **about})
    opened.close()


def report(options: argparse.Namespace) -> None:
    """Write the result of everything that has been measured so far, and print its arms."""
    found = {table: table_of(options, table) for table in tables(options)}
    write_json(options.out, {"tables": found, "command": sys.argv[1:], "commit": commit(), "versions": versions()})
    for table, rows in found.items():
        print(f"equal {UNITS[table]}: {rows['budget']:g}")
        for arm, row in rows["arms"].items():
            one, eight = row["pass_at_1"], row["pass_at_8"]
            print(f"  {arm:28s} pass@1 {one['mean']:.3f} [{one['low']:.3f}, {one['high']:.3f}]  pass@8 {eight['mean']:.3f}")
    plot(found, options.out.with_suffix(".svg"))


def table_of(options: argparse.Namespace, table: str) -> dict[str, Any]:
    """The arms for one budget, their differences from the untrained ones and from the policy gradient, and the runs."""
    graded: dict[str, dict[str, dict[str, float]]] = {}
    runs: dict[str, Any] = {}
    for seed in options.seeds:
        for arm in options.arms:
            folder = options.work / f"{table}_{arm}_s{seed}"
            pieces = {j: json.loads(piece(folder, j).read_text()) for j in jobs(folder) if piece(folder, j).exists()}
            for job, measured in pieces.items():
                for metric in ("pass_at_1", "pass_at_8"):
                    graded.setdefault(job, {}).setdefault(metric, {}).update({f"s{seed}/{q}": g for q, g in measured[metric].items()})
            if pieces:
                about = {j: {k: p[k] for k in ("temperature", "commit", "machine")} for j, p in pieces.items()}
                runs[folder.name] = {**rounds_of(folder), "measured": about}
    others = [*UNTRAINED, "policy_gradient"]
    compared = {
        f"{a}_vs_{b}": difference(graded[a]["pass_at_1"], graded[b]["pass_at_1"])
        for a in TRAINED
        for b in others
        if a != b and a in graded and b in graded and graded[a]["pass_at_1"].keys() == graded[b]["pass_at_1"].keys()
    }
    arms = {arm: {metric: interval(v) for metric, v in values.items()} | {"per_item": values} for arm, values in graded.items()}
    return {"budget": tables(options)[table], "unit": UNITS[table], "arms": arms, "pass_at_1_differences": compared, "runs": runs}


def rounds_of(folder: Path) -> dict[str, Any]:
    """The mean reward of each round's trials, and what the run spent."""
    lineage, ledger, _ = journal.read(folder / "journal.jsonl")
    scores = [[e.score for e in lineage.round(i).rewards if e.score is not None] for i in range(len(lineage))]
    rewards = [float(np.mean(s)) if s else None for s in scores]
    return {"rewards": rewards, "ledger": ledger.get("totals", {}), "config": (folder / "config.yaml").read_text()}


def plot(found: Mapping[str, Any], path: Path) -> None:
    """By table: sealed accuracy of every arm with its interval, and the rewards of every run over the share of its budget."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, max(1, len(found)), figsize=(4.2 * max(1, len(found)), 5.6), squeeze=False)
    for column, (table, rows) in enumerate(found.items()):
        arms = {arm: row["pass_at_1"] for arm, row in rows["arms"].items()}
        means = [a["mean"] for a in arms.values()]
        spread = [[a["mean"] - a["low"] for a in arms.values()], [a["high"] - a["mean"] for a in arms.values()]]
        axes[0][column].bar(range(len(arms)), means, yerr=spread or None, capsize=3)
        axes[0][column].set_xticks(range(len(arms)), [a.replace("_", "\n") for a in arms], fontsize=6)
        axes[0][column].set(title=f"equal {rows['unit']}: {rows['budget']:g}", ylabel="sealed pass@1" if not column else None, ylim=(0, 1))
        for name, run in rows["runs"].items():
            shares = np.linspace(0, 1, max(2, len(run["rewards"])))[: len(run["rewards"])]
            axes[1][column].plot(shares, [np.nan if r is None else r for r in run["rewards"]], label=name.removeprefix(f"{table}_"))
        axes[1][column].set(xlabel="share of the run's rounds", ylabel="reward of trials" if not column else None, ylim=(0, 1))
        if rows["runs"]:
            axes[1][column].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
