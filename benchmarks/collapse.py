"""A self-rewarding run that collapses, and what saves it: the same run unguarded, stopped, taken back, and with labels that cannot drift. Resumable.

    python benchmarks/collapse.py

Every run is SRT on products at a learning rate that is high on purpose; only the guard, the selector, the questions or the reward differ.
``reward`` and ``truth`` are those of the last round's rollouts, ``kept`` is the validation pass@1 of the candidate that the run leaves one
with (the last one whose own rollouts were healthy, or the latest or best where nothing watches), and ``root`` that of the untouched model.
The result is benchmarks/results/collapse.json and .svg; run folders stay under --work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _machine import RESULTS, commit, versions
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
    ],
    "labelled_early_stop": ["guard=[rounds,plateau]", "guard.plateau.patience=2", "selector=best"],
    "threshold": ["guard=[rounds]", "rewarder.threshold=0.6"],
    "offline": ["guard=[rounds]", "rewarder=majority_offline"],
    "easy": ["guard=[rounds]", "editor=rollouts_easy"],
}
LABELLED = ("gap_stop", "labelled_early_stop")
"""Those that go by labels, which are not label-free."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=[*RUNS], default=[*RUNS])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--train", type=int, default=40, help="training questions")
    parser.add_argument("--work", type=Path, default=Path("runs", "collapse"))
    parser.add_argument("--out", type=Path, default=RESULTS / "collapse.json")
    parser.add_argument("overrides", nargs="*", help="configuration overrides of every run")
    options = parser.parse_args()
    for name in options.runs:
        folder = options.work / name
        same = [
            f"task.train={options.train}",
            "task.validation=12",
            f"guard.rounds.rounds={options.rounds}",
            f"updater.lora.learning_rate={options.rate}",
        ]
        train(folder, ["strategy=srt", *RUNS[name], *same, *options.overrides])
        report(options)


def report(options: argparse.Namespace) -> None:
    """Write the result of all runs there are, and print what they came to."""
    made: dict[str, Any] = {n: outcome(options.work / n, n) for n in RUNS if (options.work / n / "journal.jsonl").exists()}
    write_json(options.out, {**made, "command": sys.argv[1:], "commit": commit(), "versions": versions()})
    for name, run in made.items():
        print(
            f"{name:20s} reward {_shown(run['reward'])} truth {_shown(run['truth'])} kept {_shown(run['kept'])} root {_shown(run['root'])}",
            flush=True,
        )
    plot(made, options.out.with_suffix(".svg"))


def outcome(folder: Path, name: str) -> dict[str, Any]:
    """What a run came to."""
    lineage, _, _ = journal.read(folder / "journal.jsonl")
    told = rounds_of(folder)
    last = told["rounds"][-1] if told["rounds"] else {}
    return {
        "reward": last.get("reward"),
        "truth": last.get("accuracy"),
        "root": lineage.score(lineage.root.id),
        "kept": lineage.score(kept(folder)),
        "label_free": name not in LABELLED,
        "rounds": len(lineage),
        "curve": [{k: r[k] for k in ("reward", "accuracy", "pseudo_label", "across", "no_answer", "kl") if k in r} for r in told["rounds"]],
        "ledger": told["ledger"],
        "config": told["config"],
    }


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
    """Reward against truth over the rounds of every run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(made), figsize=(2.6 * len(made), 2.8), sharey=True, squeeze=False)
    for axis, (name, run) in zip(axes[0], made.items(), strict=True):
        for metric, label in (("reward", "reward"), ("accuracy", "truth"), ("across", "share of the commonest answer")):
            points = [(i + 1, r[metric]) for i, r in enumerate(run["curve"]) if metric in r]
            axis.plot([x for x, _ in points], [y for _, y in points], marker=".", label=label)
        axis.set(title=name.replace("_", " "), xlabel="round", ylim=(-0.02, 1.02))
    axes[0][0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
