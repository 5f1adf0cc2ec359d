"""EGGROLL and ES against policy gradient with true labels, on products of small numbers, for equal cost. Resumable: run it again after a kill.

    python benchmarks/es_arithmetic.py --seeds 0 1 2
    python benchmarks/es_arithmetic.py --arms eggroll policy_gradient --flops 5e13 --tokens 0

The task, the questions, the answers' length and the policy gradient's settings are those of `srt_arithmetic.py`; the settings of the others were
chosen on validation with another seed (`es_exploration.py`). For each seed and each table it trains one run per arm on the train split until its
budget is spent: nominal FLOPs in the table `flops`, generated tokens in the table `tokens`. All are rewarded by the same labels for the same kind
of answers, sampled at temperature 1. None is evaluated while it trains: all of the budget is training's. A run stops after the round that spends
its budget, and `spent` tells by how much; the policy gradient, whose rounds are large, is measured one round earlier too (`policy_gradient_within`).
Then it opens the sealed test split in a process of its own and measures the last candidate, and once for every seed the root: at temperature 1,
greedily, and at the temperature that is best on validation. Several processes with one --work can take a seed each. The result is
benchmarks/results/es_arithmetic.json and .svg; run folders stay under --work. The two tables' runs of an arm begin alike, so they find one
another's finished tiles, and each is charged in full.
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
from _machine import RESULTS, arguments, commit, describe, versions
from seal_knowledge import difference, piece, train
from srt_arithmetic import SETTING, answered, best_temperature, interval

from selfimprove import journal
from selfimprove.storage import write_json

SAMPLED = ["rewarder.levels=[0]", "rewarder.temperature=1", "rewarder.samples=4", "editor.population=16", "editor.sigma=0.008"]
"""The fitness: the share of right answers at temperature 1, to products of one-digit numbers; and 8 pairs of noise."""
TRAINED = {
    # a step forms all weights anew however many rows it has, so a member of es gets more of them
    "es": ["strategy=es", *SAMPLED, "rewarder.prompts=8", "updater.ascent.learning_rate=0.016"],
    "eggroll": ["strategy=eggroll", *SAMPLED, "rewarder.prompts=4", "updater.ascent.learning_rate=0.016"],
    "policy_gradient": ["strategy=srt", "rewarder=verifier", "middleware=[]", *SETTING],
}
UNTRAINED = {"untrained": 1.0, "untrained_greedy": 0.0, "untrained_best_temperature": None}
"""The temperature at which the root answers; None is the best one on validation."""
WITHIN = "policy_gradient_within"
"""The policy gradient one round earlier, within the budget of the first table: its rounds are large, so that its last one ends well above."""
UNITS = {"flops": "flops", "tokens": "generated_tokens"}
"""The ledger's unit that each table's budget is in. The first table is the main one."""
SAMPLES = 8
"""Answers to each question."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=[*TRAINED], default=[*TRAINED])
    parser.add_argument("--flops", type=float, default=1.35e13, help="budget of the table `flops`; 0 leaves it out")
    parser.add_argument("--tokens", type=int, default=13_500, help="budget of the table `tokens`; 0 leaves it out")
    parser.add_argument("--train", type=int, default=40, help="training questions")
    parser.add_argument("--test", type=int, default=30, help="sealed questions")
    parser.add_argument("--work", type=Path, default=Path("runs", "es_arithmetic"))
    parser.add_argument("--out", type=Path, default=RESULTS / "es_arithmetic.json")
    parser.add_argument("--measure", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--jobs", nargs="+", default=(), help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="configuration overrides of every run; ARM:KEY=VALUE of one arm's")
    options = arguments(parser)
    if options.measure:
        measure(options.measure, options.jobs)
        return
    for seed in options.seeds:
        for table, arm in runs(options):
            folder = folder_of(options, table, arm, seed)
            train(folder, settings(options, table, arm, seed), options.work / "tiles")
            if missing := [j for j in jobs(options, table, arm) if not piece(folder, j).exists()]:
                subprocess.run([sys.executable, __file__, "--measure", str(folder), "--jobs", *missing], check=True)
        report(options)


def tables(options: argparse.Namespace) -> dict[str, float]:
    """The budget of each table."""
    return {name: float(budget) for name in UNITS if (budget := getattr(options, name))}


def runs(options: argparse.Namespace) -> list[tuple[str, str]]:
    """The table and the arm of every run of a seed."""
    return [(t, a) for t in tables(options) for a in options.arms]


def folder_of(options: argparse.Namespace, table: str, arm: str, seed: int) -> Path:
    return Path(options.work, f"{table}_{arm}_s{seed}")


def settings(options: argparse.Namespace, table: str, arm: str, seed: int) -> list[str]:
    """The overrides of one run."""
    sizes = [f"task.train={options.train}", "task.validation=12", f"task.test={options.test}", f"task.seed={seed}", f"seed={seed}"]
    budget = ["evaluator=none", "guard=[budget]", f"guard.budget.{UNITS[table]}={tables(options)[table]:g}"]
    own = [o.removeprefix(f"{arm}:") for o in options.overrides if o.startswith(f"{arm}:") or ":" not in o.partition("=")[0]]
    return [*TRAINED[arm], *sizes, *budget, *own]


def jobs(options: argparse.Namespace, table: str, arm: str) -> list[str]:
    """What is measured of a finished run: its last candidate, with the first run of a seed the root, and what the policy gradient had before."""
    within = [WITHIN] if (table, arm) == ("flops", "policy_gradient") else []
    return [arm, *within, *(UNTRAINED if (table, arm) == runs(options)[0] else ())]


def measure(folder: Path, names: Sequence[str]) -> None:
    """Open the sealed split and measure these of a finished run, each into a file of its own."""
    import torch

    from selfimprove import config, session

    composed = config.load(folder / "config.yaml")
    composed.values["evaluator"] = {"_target_": "selfimprove.rollouts.PassAtK", "samples": SAMPLES, "greedy": False}
    best = best_temperature(folder, composed) if "untrained_best_temperature" in names else 1.0
    opened = session.Session(config.build(composed), folder, evaluation_split="test")
    run, lineage = opened.run, opened.lineage
    about = {"commit": commit(), "machine": {**describe(torch.device(run.models.engine.key["device"])), "engine": dict(run.models.engine.key)}}
    for name in names:
        before = lineage.round(-1).parents[0]  # what the last round began with
        policy = (lineage.root if name in UNTRAINED else lineage[before] if name == WITHIN else lineage.latest).parts["policy"]
        told = UNTRAINED.get(name, 1.0)
        temperature = best if told is None else told
        with run.stage("evaluate", 1):
            write_json(piece(folder, name), {**answered(run, policy, temperature), "temperature": temperature, **about})
    opened.close()


def report(options: argparse.Namespace) -> None:
    """Write the result of everything that has been measured so far, and print its arms."""
    found = {table: table_of(options, table) for table in tables(options)}
    main_table = next(iter(found.values()))
    made = {
        "arms": main_table["arms"],
        "pass_at_1_differences": main_table["pass_at_1_differences"],
        "tables": found,
        "command": sys.argv[1:],
        "commit": commit(),
        "versions": versions(),
    }
    write_json(options.out, made)
    for rows in found.values():
        print(f"equal {rows['unit']}: {rows['budget']:g}")
        for arm, row in rows["arms"].items():
            one, eight = row["pass_at_1"], row["pass_at_8"]
            print(f"  {arm:28s} pass@1 {one['mean']:.3f} [{one['low']:.3f}, {one['high']:.3f}]  pass@8 {eight['mean']:.3f}")
    plot(found, options.out.with_suffix(".svg"))


def table_of(options: argparse.Namespace, table: str) -> dict[str, Any]:
    """The arms for one budget, their differences from the untrained ones and from the policy gradient, and the runs."""
    graded: dict[str, dict[str, dict[str, float]]] = {}
    made: dict[str, Any] = {}
    for seed in options.seeds:
        for where, arm in runs(options):
            folder = folder_of(options, where, arm, seed)
            wanted = [j for j in jobs(options, where, arm) if where == table or j in UNTRAINED]  # the root is the same for every budget
            pieces = {j: json.loads(piece(folder, j).read_text()) for j in wanted if piece(folder, j).exists()}
            for job, measured in pieces.items():
                for metric in ("pass_at_1", "pass_at_8"):
                    graded.setdefault(job, {}).setdefault(metric, {}).update({f"s{seed}/{q}": g for q, g in measured[metric].items()})
            if pieces and where == table:
                about = {j: {k: p[k] for k in ("temperature", "commit", "machine")} for j, p in pieces.items()}
                made[folder.name] = {"arm": arm, "seed": seed, **rounds_of(folder), "measured": about}
    others = [*UNTRAINED, "policy_gradient", WITHIN]
    compared = {
        f"{a}_vs_{b}": difference(graded[a]["pass_at_1"], graded[b]["pass_at_1"])
        for a in (*TRAINED, WITHIN)
        for b in others
        if a != b and a in graded and b in graded and graded[a]["pass_at_1"].keys() == graded[b]["pass_at_1"].keys()
    }
    arms = {
        arm: {metric: interval(v) for metric, v in graded[arm].items()} | {"per_item": graded[arm]}
        for arm in (*UNTRAINED, *TRAINED, WITHIN)
        if arm in graded
    }
    spent = {
        arm: {unit: float(np.mean([r["ledger"][unit] for r in made.values() if r["arm"] == arm])) for unit in UNITS.values()}
        for arm in dict.fromkeys(r["arm"] for r in made.values())
    }
    if cheaper := [r["spent_before"][-1] for r in made.values() if WITHIN in r["measured"]]:
        spent[WITHIN] = {unit: float(np.mean([c[unit] for c in cheaper])) for unit in UNITS.values()}
    return {"budget": tables(options)[table], "unit": UNITS[table], "arms": arms, "pass_at_1_differences": compared, "spent": spent, "runs": made}


def rounds_of(folder: Path) -> dict[str, Any]:
    """The mean reward of each round's trials, what had been spent before it by unit, and what the run spent."""
    lineage, ledger, _ = journal.read(folder / "journal.jsonl")
    scores = [[e.score for e in r.rewards if e.score is not None] for r in lineage.rounds]
    before = [{unit: spent.get(unit, 0.0) for unit in UNITS.values()} for spent in journal.spending(folder / "journal.jsonl")]
    return {
        "rewards": [float(np.mean(s)) if s else None for s in scores],
        "spent_before": before[: len(scores)],
        "ledger": ledger.get("totals", {}),
        "config": (folder / "config.yaml").read_text(),
    }


def plot(found: Mapping[str, Any], path: Path) -> None:
    """By table: the share of right training answers over what had been spent, with a band over seeds, and the sealed pass@1 with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {arm: f"C{i}" for i, arm in enumerate(TRAINED)}
    figure, axes = plt.subplots(len(found), 2, figsize=(10, 3.6 * len(found)), squeeze=False, gridspec_kw={"width_ratios": [1.4, 1]})
    for (left, right), rows in zip(axes, found.values(), strict=True):
        unit = rows["unit"].replace("_", " ").replace("flops", "FLOPs")
        for arm in TRAINED:
            curves = [curve(run, rows["unit"]) for run in rows["runs"].values() if run["arm"] == arm and len(run["rewards"]) > 1]
            if not curves:
                continue
            grid = np.linspace(0, min(x[-1] for x, _ in curves), 50)
            values = np.array([np.interp(grid, x, y) for x, y in curves])  # (seeds, 50)
            left.plot(grid, values.mean(axis=0), color=colours[arm], label=arm.replace("_", " "))
            left.fill_between(grid, values.min(axis=0), values.max(axis=0), color=colours[arm], alpha=0.2, linewidth=0)
        left.set(xlabel=f"{unit} spent before the round", ylabel="right answers in training", ylim=(0, 1))
        left.set_title("mean over seeds, and their range", fontsize=9)
        left.legend(fontsize=8)
        arms = rows["arms"]
        means = np.array([a["pass_at_1"]["mean"] for a in arms.values()])
        spread = np.abs(np.array([[a["pass_at_1"][end] for a in arms.values()] for end in ("low", "high")]) - means)
        places = np.arange(len(arms))
        right.barh(places, means, xerr=spread, capsize=3, color=[colours.get(a, "0.7") for a in arms])
        right.set_yticks(places, [a.replace("_", " ") for a in arms], fontsize=8)
        right.invert_yaxis()
        right.set(xlabel="sealed pass@1, with 95 % intervals", xlim=(0, 1))
        right.set_title(f"equal {unit}: {rows['budget']:.3g}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def curve(run: Mapping[str, Any], unit: str) -> tuple[np.ndarray, np.ndarray]:
    """What had been spent before each round that was rewarded, and its mean reward. (N,), (N,)"""
    points = [(spent[unit], reward) for spent, reward in zip(run["spent_before"], run["rewards"], strict=True) if reward is not None]
    x, y = np.array(points).T
    return x, y


if __name__ == "__main__":
    main()
