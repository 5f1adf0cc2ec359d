"""Rewards without labels against the truth, chance and no training at all, on products of small numbers. Resumable: run it again after a kill.

    python benchmarks/srt_arithmetic.py --seeds 0 1 2
    python benchmarks/srt_arithmetic.py --arms srt em_ft self_rewarding star spin --seeds 0 1 2 --out benchmarks/results/srt_siblings.json

For each seed (questions of its own) it trains one run per arm on the train split, each on as many rollouts, then opens the sealed test split in a
process of its own and measures the last candidate. The untrained arms are the root: sampled at temperature 1, greedily, at the temperature that is
best on validation, and by the majority of its samples. Several processes with one --work can take a seed each. The result is
benchmarks/results/srt_arithmetic.json and .svg; run folders stay under --work.
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

from selfimprove import journal
from selfimprove.nulls import Untouched
from selfimprove.records import Candidate, Lineage, Part
from selfimprove.rollouts import replies
from selfimprove.storage import write_json
from selfimprove.truth import truth_of

TRAINED = {
    "srt": ["rewarder=majority"],
    "true_labels": ["rewarder=verifier"],
    "random_reward": ["rewarder=chance"],
    "offline": ["rewarder=majority_offline"],
    "self_certainty": ["rewarder=self_certainty"],
    "entropy": ["rewarder=token_entropy"],
    "em_ft": ["rewarder=token_entropy", "updater=em_ft"],
    "self_rewarding": ["rewarder=self_judge_short", "updater=self_rewarding"],
    "star": ["rewarder=verifier", "updater=star", "editor.prompts=0", "editor.samples=3"],
    "spin": ["rewarder=verifier", "updater=spin", "editor.prompts=0", "editor.samples=1"],
}
MAIN = ("srt", "true_labels", "random_reward", "offline", "self_certainty", "entropy")
"""Those that are trained where no others are named."""
SETTING = ["editor.levels=[0]"]
"""What every run has: it trains on products of one-digit numbers; validation and the sealed test hold longer ones too."""
UNTRAINED = ("untrained", "untrained_greedy", "untrained_best_temperature", "majority")
TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Among which the best one on validation is chosen."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=[*TRAINED], default=[*MAIN])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--train", type=int, default=40, help="training questions")
    parser.add_argument("--test", type=int, default=30, help="sealed questions")
    parser.add_argument("--work", type=Path, default=Path("runs", "srt_arithmetic"))
    parser.add_argument("--out", type=Path, default=RESULTS / "srt_arithmetic.json")
    parser.add_argument("--measure", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="configuration overrides of every run")
    options = arguments(parser)
    if options.measure:
        measure(options.measure)
        return
    for seed in options.seeds:
        for arm in options.arms:
            folder = options.work / f"{arm}_s{seed}"
            sizes = [f"task.train={options.train}", "task.validation=12", f"task.test={options.test}", f"task.seed={seed}"]
            train(
                folder, ["strategy=srt", *TRAINED[arm], *SETTING, *sizes, f"seed={seed}", f"guard.rounds.rounds={options.rounds}", *options.overrides]
            )
            if any(not piece(folder, job).exists() for job in jobs(folder, options.arms)):
                subprocess.run([sys.executable, __file__, "--arms", *options.arms, "--measure", str(folder)], check=True)
        report(options)


def jobs(folder: Path, arms: Sequence[str] = ()) -> list[str]:
    """What is measured of a finished run: its last candidate and, once for every seed, the root."""
    arm = folder.name.rpartition("_s")[0]
    return [arm, *(UNTRAINED if arm == next(iter(TRAINED)) else ())]


def measure(folder: Path) -> None:
    """Open the sealed split and measure what has not been measured of a finished run, each job into a file of its own."""
    import torch

    from selfimprove import config, session

    composed = config.load(folder / "config.yaml")
    best = best_temperature(folder) if not all(piece(folder, j).exists() for j in jobs(folder)) else 1.0
    opened = session.Session(config.build(composed), folder, evaluation_split="test")
    run, lineage = opened.run, opened.lineage
    about = {"commit": commit(), "machine": {**describe(torch.device(run.models.engine.key["device"])), "engine": dict(run.models.engine.key)}}
    policies = {j: lineage.root.parts["policy"] if j in UNTRAINED else lineage.latest.parts["policy"] for j in jobs(folder)}
    for name, policy in policies.items():
        if piece(folder, name).exists():
            continue
        temperature = {"untrained_greedy": 0.0, "untrained_best_temperature": best}.get(name, 1.0)
        with run.stage("evaluate", 1):
            found = voted(run, lineage) if name == "majority" else answered(run, policy, temperature)
        write_json(piece(folder, name), {**found, "temperature": temperature, **about})
    opened.close()


def best_temperature(folder: Path, composed: Any = None) -> float:
    """The temperature at which the root answers most validation questions, by the evaluator of the run or of another configuration."""
    from selfimprove import config, session

    opened = session.Session(config.build(composed or config.load(folder / "config.yaml")), folder)
    try:
        with opened.run.stage("evaluate", 1):
            root = opened.lineage.root.parts["policy"]
            score = {t: float(np.mean(list(answered(opened.run, root, t)["pass_at_1"].values()))) for t in TEMPERATURES}
    finally:
        opened.close()
    return max(TEMPERATURES, key=lambda t: score[t])


def answered(run: Any, policy: Part, temperature: float) -> dict[str, dict[str, float]]:
    """pass@1 and pass@8 of every question."""
    asked = [(i, q) for i in run.task.evaluation for q in i.questions]
    [answers] = replies(run, [(Candidate.root(policy=policy), asked)], temperature, run.roles["evaluator"].samples)
    grades: dict[str, list[float]] = {}
    for answer in answers:
        grades.setdefault(answer.question.id, []).append(answer.grade)
    return {"pass_at_1": {q: float(np.mean(g)) for q, g in grades.items()}, "pass_at_8": {q: max(g) for q, g in grades.items()}}


def voted(run: Any, lineage: Lineage) -> dict[str, dict[str, float]]:
    """The grade of the untouched model's majority answer to every question, of as many samples."""
    found = Untouched("majority", samples=run.roles["evaluator"].samples).measure(run, lineage, lineage.root)
    return {"pass_at_1": dict(found.per_item), "pass_at_8": dict(found.per_item)}


def report(options: argparse.Namespace) -> None:
    """Write the result of everything that has been measured so far, and print its arms."""
    graded: dict[str, dict[str, dict[str, float]]] = {}
    runs: dict[str, dict[str, Any]] = {}
    for seed in options.seeds:
        for arm in options.arms:
            folder = options.work / f"{arm}_s{seed}"
            pieces = {j: json.loads(piece(folder, j).read_text()) for j in jobs(folder) if piece(folder, j).exists()}
            for job, found in pieces.items():
                for metric in ("pass_at_1", "pass_at_8"):
                    graded.setdefault(job, {}).setdefault(metric, {}).update({f"s{seed}/{q}": g for q, g in found[metric].items()})
            if pieces:
                runs[folder.name] = {
                    **rounds_of(folder),
                    "measured": {j: {k: p[k] for k in ("temperature", "commit", "machine")} for j, p in pieces.items()},
                }
    arms = {arm: {metric: interval(values) for metric, values in found.items()} | {"per_item": found} for arm, found in graded.items()}
    compared = {
        f"{a}_vs_{b}": difference(graded[a]["pass_at_1"], graded[b]["pass_at_1"]) for a in TRAINED if a in graded for b in UNTRAINED if b in graded
    }
    verdicts = {a: verdict(a, compared) for a in TRAINED if a in graded and "untrained" in graded}
    made = {
        "arms": arms,
        "pass_at_1_differences": compared,
        "verdicts": verdicts,
        "runs": runs,
        "command": sys.argv[1:],
        "commit": commit(),
        "versions": versions(),
    }
    write_json(options.out, made)
    for arm, found in arms.items():
        one, eight = found["pass_at_1"], found["pass_at_8"]
        said = f"  {verdicts[arm]}" if arm in verdicts else ""
        print(f"{arm:28s} pass@1 {one['mean']:.3f} [{one['low']:.3f}, {one['high']:.3f}]  pass@8 {eight['mean']:.3f}{said}")
    plot(runs, options.out.with_suffix(".svg"))


def verdict(arm: str, compared: Mapping[str, Mapping[str, float]]) -> str:
    """``learning`` where an arm is above the untrained model at temperature 1, greedily and at its best temperature, by intervals above 0;
    ``sharpening`` where it is above temperature 1 only; ``no gain``, or ``loss``, elsewhere."""
    against = {b: compared[f"{arm}_vs_{b}"] for b in ("untrained", "untrained_greedy", "untrained_best_temperature")}
    if all(d["low"] > 0 for d in against.values()):
        return "learning"
    if against["untrained"]["low"] > 0:
        return "sharpening"
    return "loss" if against["untrained"]["high"] < 0 else "no gain"


def rounds_of(folder: Path) -> dict[str, Any]:
    """What the monitor saw in each round, the validation scores of what was made, and what the run spent."""
    lineage, ledger, _ = journal.read(folder / "journal.jsonl")
    rounds = [{**truth_of(lineage.round(i)), **validation(lineage.round(i).scores)} for i in range(len(lineage))]
    return {"rounds": rounds, "ledger": ledger.get("totals", {}), "config": (folder / "config.yaml").read_text()}


def validation(scores: Sequence[Any]) -> dict[str, float]:
    """Of the youngest candidate that was scored in a round."""
    measured = [e for _, e in scores if e.score is not None]
    return {f"validation_{n}": v for n, v in measured[-1].metrics.items()} if measured else {}


def interval(values: Mapping[str, float], draws: int = 10_000) -> dict[str, float]:
    """The mean and its 95 % bootstrap interval over questions."""
    x = np.array(list(values.values()))
    low, high = np.percentile(x[np.random.default_rng(0).integers(len(x), size=(draws, len(x)))].mean(axis=1), [2.5, 97.5])
    return {"mean": float(x.mean()), "low": float(low), "high": float(high), "questions": float(len(x))}


def plot(runs: Mapping[str, Any], path: Path) -> None:
    """Reward and truth of every run over its rounds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, max(1, len(runs)), figsize=(3.2 * max(1, len(runs)), 3), sharey=True, squeeze=False)
    for axis, (name, run) in zip(axes[0], runs.items(), strict=False):
        for metric, label in (
            ("accuracy", "truth (rollouts)"),
            ("pseudo_label", "truth of what the reward prefers"),
            ("validation_pass_at_1", "validation pass@1"),
        ):
            axis.plot([r.get(metric, float("nan")) for r in run["rounds"]], label=label)
        axis.set(title=name, xlabel="round", ylim=(0, 1))
    axes[0][0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
