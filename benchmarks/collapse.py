"""A self-rewarding run that collapses, and what saves it: the same run unguarded, stopped, taken back, and with labels that cannot drift. Resumable.

    python benchmarks/collapse.py --seeds 0 1 2

Every run is SRT on sums and differences of two numbers at a learning rate that is high on purpose; only the guard, the selector, the questions
or the reward differ, and each seed has questions of its own. Rounds that runs have in common are computed once. Told of the candidate that a run
leaves one with (the last one whose own rollouts were healthy, or the latest or best where nothing watches): ``truth``, its pass@1 on validation,
as ``root`` is the untouched model's; ``reward``, what its rollouts paid themselves, and ``rollout_truth``, how many of them were right (its
parent's, where it wrote none). ``last_reward`` and ``last_truth`` are those of the last round's rollouts. All are means over the seeds, whose
own stand in ``seeds``. The result is benchmarks/results/collapse.json and .svg; run folders stay under --work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _machine import RESULTS, arguments, commit, versions
from seal_knowledge import train
from srt_arithmetic import rounds_of

from selfimprove import journal
from selfimprove.storage import write_json

RUNS: dict[str, list[str]] = {
    "unguarded": ["guard=[rounds]"],
    "stop": ["guard=[rounds,collapse]", "selector=before_collapse"],
    "fallback": ["guard=[rounds]", "selector=before_collapse"],
    "gap_stop": [
        "guard=[rounds,collapse]",
        "selector=before_collapse",
        *(f"+{where}.above.gap=0.4" for where in ("guard.collapse", "selector")),
        *(f"~{where}.above.{name}" for where in ("guard.collapse", "selector") for name in ("across", "no_answer", "kl")),
        "~selector.rise.kl",
    ],
    "labelled_early_stop": ["guard=[rounds,plateau]", "guard.plateau.patience=2", "selector=best"],
    "threshold": ["guard=[rounds]", "rewarder.threshold=0.6"],
    "offline": ["guard=[rounds]", "rewarder=majority_offline"],
    "easy": ["guard=[rounds]", "editor=rollouts_easy"],
}
SETTING = [
    "task.family=chain_sum",
    "task.levels=[{min_terms:2,max_terms:2,min_digits:1,max_digits:1},{min_terms:2,max_terms:2,min_digits:1,max_digits:2}]",
]
LABELLED = ("gap_stop", "labelled_early_stop")
"""Those that go by labels, which are not label-free."""
MEANS = ("reward", "truth", "root", "rollout_truth", "last_reward", "last_truth")
CURVES = ("reward", "accuracy", "validation_pass_at_1", "pseudo_label", "across", "no_answer", "kl")
"""What the truth monitor saw in each round, and the validation score of what the round made."""
DRAWN = {"reward": "reward", "accuracy": "truth of the rollouts", "validation_pass_at_1": "truth on validation"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", nargs="+", choices=[*RUNS], default=[*RUNS])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--train", type=int, default=40, help="training questions")
    parser.add_argument("--work", type=Path, default=Path("runs", "collapse"))
    parser.add_argument("--out", type=Path, default=RESULTS / "collapse.json")
    parser.add_argument("overrides", nargs="*", help="configuration overrides of every run")
    options = arguments(parser)
    for seed in options.seeds:
        for name in options.runs:
            same = [
                f"seed={seed}",
                f"task.seed={seed}",
                f"task.train={options.train}",
                "task.validation=12",
                f"guard.rounds.rounds={options.rounds}",
                f"updater.lora.learning_rate={options.rate}",
            ]
            train(options.work / f"{name}_s{seed}", ["strategy=srt", *RUNS[name], *SETTING, *same, *options.overrides], options.work / "tiles")
            report(options)


def report(options: argparse.Namespace) -> None:
    """Write the result of all runs there are, and print what they came to."""
    made: dict[str, Any] = {}
    for name in RUNS:
        folders = {seed: options.work / f"{name}_s{seed}" for seed in options.seeds}
        if found := {str(seed): outcome(folder) for seed, folder in folders.items() if (folder / "journal.jsonl").exists()}:
            made[name] = {**over_seeds([*found.values()]), "label_free": name not in LABELLED, "seeds": found}
    write_json(options.out, {**made, "command": sys.argv[1:], "commit": commit(), "versions": versions()})
    for name, run in made.items():
        told = "  ".join(f"{metric} {_shown(run[metric])}" for metric in MEANS)
        print(f"{name:20s} {told}  seeds {' '.join(run['seeds'])}", flush=True)
    plot(made, options.out.with_suffix(".svg"))


def outcome(folder: Path) -> dict[str, Any]:
    """What a run came to."""
    lineage, _, _ = journal.read(folder / "journal.jsonl")
    told = rounds_of(folder)
    last = told["rounds"][-1] if told["rounds"] else {}
    one = kept(folder)
    asked = next((i for i in reversed(range(len(lineage))) if one in lineage.round(i).parents), lineage.round_of(one))
    own = told["rounds"][asked] if 0 <= asked < len(lineage) else {}
    return {
        "reward": own.get("reward"),
        "truth": lineage.score(one),
        "root": lineage.score(lineage.root.id),
        "rollout_truth": own.get("accuracy"),
        "last_reward": last.get("reward"),
        "last_truth": last.get("accuracy"),
        "rounds": len(lineage),
        "curve": [{k: r[k] for k in CURVES if k in r} for r in told["rounds"]],
        "ledger": told["ledger"],
        "config": told["config"],
    }


def over_seeds(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The means over the runs of all seeds: of each number, and by round over those that came so far (``runs`` says how many)."""
    longest = max(r["rounds"] for r in runs)
    curve = []
    for i in range(longest):
        there = [r["curve"][i] for r in runs if i < r["rounds"]]
        means = {metric: mean([point.get(metric) for point in there]) for metric in CURVES}
        curve.append({metric: m for metric, m in means.items() if m is not None} | {"runs": len(there)})
    return {**{metric: mean([r[metric] for r in runs]) for metric in MEANS}, "rounds": longest, "curve": curve}


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of those that there are; None without any."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def kept(folder: Path) -> str:
    """The id of the candidate that a user is left with: before a collapse that was seen, or the one that the run's selector would go on from."""
    from selfimprove import config, session
    from selfimprove.collapse import BeforeCollapse

    opened = session.Session(config.build(config.load(folder / "config.yaml")), folder)
    try:
        selector = opened.run.roles["selector"]
        if isinstance(selector, BeforeCollapse):
            return selector.proven(opened.lineage).id
        return str(opened.hook.select(lineage=opened.lineage, run=opened.run)[0].id)
    finally:
        opened.close()


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def plot(made: Mapping[str, Any], path: Path) -> None:
    """Reward against truth over the rounds: a panel for every run, a thin line for every seed, the mean in bold."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(4, len(made))
    rows = -(-len(made) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 2.6 * rows), sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(made) :]:
        axis.axis("off")
    for axis, (name, run) in zip(axes.flat, made.items(), strict=False):
        for colour, (metric, label) in enumerate(DRAWN.items()):
            for curve, width in (*((r["curve"], 0.5) for r in run["seeds"].values()), (run["curve"], 1.8)):
                points = [(i + 1, r[metric]) for i, r in enumerate(curve) if metric in r]
                axis.plot(
                    [x for x, _ in points], [y for _, y in points], f"C{colour}", linewidth=width, label=label if curve is run["curve"] else None
                )
        axis.set(title=name.replace("_", " "), xlabel="round", ylim=(-0.02, 1.02))
    axes[0][0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
