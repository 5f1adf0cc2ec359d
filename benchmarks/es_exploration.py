"""What evolution strategies want of a small model: how much noise, how long a step, how large a population, which fitness. Resumable.

    python benchmarks/es_exploration.py                          # everything
    python benchmarks/es_exploration.py --only noise_1_0.004     # some of it

Products of one-digit numbers to train on, a seed that `es_arithmetic.py` does not use, and validation questions only: the sealed test stays
closed. `noise_RANK_SIGMA` measures one population. Everything else is a run to the same number of FLOPs, whose last candidate answers the
validation questions. The result is benchmarks/results/es_exploration.json; finished work is found under --work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _machine import RESULTS, arguments, commit, describe, versions
from srt_arithmetic import interval

from selfimprove import config, journal
from selfimprove.records import Evaluation
from selfimprove.rollouts import Asking, PassAtK
from selfimprove.session import Session
from selfimprove.storage import write_json
from selfimprove_evolution import AnswerLikelihood, Fitness

SEED = 7
SIZES = [f"seed={SEED}", f"task.seed={SEED}", "task.train=40", "task.validation=24", "task.test=2", "evaluator=none", "observer=[]"]
SAMPLED = ["rewarder.levels=[0]", "rewarder.temperature=1", "rewarder.prompts=4", "rewarder.samples=4"]
"""The fitness that policy gradients are rewarded by: the share of right answers at temperature 1."""
LIKELIHOOD = ["rewarder=answer_likelihood", "rewarder.levels=[0]"]
NOISE = {f"noise_{rank}_{sigma}": (rank, sigma) for rank, sigma in ((1, 0.004), (1, 0.008), (1, 0.016), (0, 0.008))}


def eggroll(population: int, sigma: float, steps: float, *more: str) -> list[str]:
    """A run of EGGROLL. `steps` is the learning rate in units of sigma: over the root of the population, about how far a child is from its
    parent, as a share of a member's distance."""
    return [
        "strategy=eggroll",
        f"editor.population={population}",
        f"editor.sigma={sigma}",
        f"updater.ascent.learning_rate={steps * sigma:g}",
        *(more or SAMPLED),
    ]


RUNS: dict[str, list[str]] = {
    "eggroll": eggroll(16, 0.008, 2),
    "es": ["strategy=es", *eggroll(16, 0.008, 2)[1:], "rewarder.prompts=8"],
    "population_8": eggroll(8, 0.008, 1.4),
    "population_32": eggroll(32, 0.008, 4),
    "short_steps": eggroll(16, 0.008, 1),
    "ranks": [*eggroll(16, 0.008, 7), "updater.shaping=centred_ranks"],
    "few_prompts": [*eggroll(16, 0.008, 2), "rewarder.prompts=2"],
    "likelihood": eggroll(32, 0.008, 4, *LIKELIHOOD, "rewarder.prompts=8"),
}
ROOT_BESIDE = "eggroll"
"""The run beside which the root is measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*NOISE, *RUNS], default=[*NOISE, *RUNS])
    parser.add_argument("--flops", type=float, default=1e13, help="budget of each run")
    parser.add_argument("--work", type=Path, default=Path("runs", "es_exploration"))
    parser.add_argument("--out", type=Path, default=RESULTS / "es_exploration.json")
    parser.add_argument("overrides", nargs="*", help="configuration overrides of everything")
    options = arguments(parser)
    for name in options.only:
        folder = options.work / name
        if not (folder / "found.json").exists():
            found = noise(folder, *NOISE[name], options.overrides) if name in NOISE else trained(folder, RUNS[name], options)
            write_json(folder / "found.json", found)
        told = {k: v for k, v in json.loads((folder / "found.json").read_text()).items() if k not in ("machine", "overrides", "commit")}
        print(name, json.dumps(told), flush=True)
    done = {n: json.loads(path.read_text()) for n in (*NOISE, *RUNS) if (path := options.work / n / "found.json").exists()}
    write_json(options.out, {"found": done, "versions": versions()})


def opened(folder: Path, overrides: Sequence[str]) -> tuple[Session, dict[str, Any]]:
    """A session, and what is to be known about it."""
    session = Session(config.build(config.compose([*overrides, *SIZES])), folder)
    key = dict(session.run.models.engine.key)
    return session, {"overrides": list(overrides), "commit": commit(), "machine": {**describe(torch.device(key["device"])), "engine": key}}


def noise(folder: Path, rank: int, sigma: float, overrides: Sequence[str], members: int = 16) -> dict[str, Any]:
    """How fit a population around the untouched model is, by sampled answers and by likelihood."""
    shape = [f"editor.population={members}", f"editor.sigma={sigma}", f"editor.rank={rank}"]
    session, about = opened(folder, ["strategy=eggroll", *shape, *overrides])
    hook, lineage, run = session.hook, session.lineage, session.run
    trials = hook.apply(edits=hook.propose(parents=[lineage.root], lineage=lineage, run=run), lineage=lineage, run=run)
    asking: Asking = run.roles["rewarder"].asking
    fitnesses = {"sampled": Fitness(run.roles["rewarder"].inner, asking, 8, 4, 1.0, [0]), "likelihood": AnswerLikelihood(asking, 8, [0])}
    found: dict[str, Any] = {}
    for name, fitness in fitnesses.items():
        before = run.ledger.totals["flops"]
        with run.stage("reward", len(trials)):
            found[name] = spread(fitness.measure(trials, fitness.questions(lineage, run), lineage, run))
        found[name]["flops"] = run.ledger.totals["flops"] - before
    session.close()
    return {**found, **about}


def spread(rewards: Sequence[Evaluation]) -> dict[str, float]:
    """The mean fitness of a population, its standard deviation, and what of that is the members' own: two halves of the questions agree on it."""
    table = np.array([list(r.per_item.values()) for r in rewards])  # (members, questions)
    one, other = table[:, ::2].mean(axis=1), table[:, 1::2].mean(axis=1)
    own = float(np.cov(one, other)[0, 1])
    return {"mean": float(table.mean()), "deviation": float(table.mean(axis=1).std(ddof=1)), "own_deviation": float(np.sign(own) * abs(own) ** 0.5)}


def trained(folder: Path, overrides: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """What a run ends with on validation, its rewards round by round, and what it spent."""
    budget = ["guard=[budget]", f"guard.budget.flops={options.flops:g}"]
    session, about = opened(folder, [*overrides, *budget, *options.overrides])
    lineage = session.improve()
    _, ledger, _ = journal.read(folder / "journal.jsonl")
    session, _ = opened(folder, [*overrides, *budget, *options.overrides])
    chosen = {**({"root": lineage.root} if folder.name == ROOT_BESIDE else {}), "latest": lineage.latest}
    with session.run.stage("evaluate", 1), session.run.task.reading_as("es_exploration", True):
        measured = {n: PassAtK(8).measure(session.run, c.parts["policy"]) for n, c in chosen.items()}
    session.close()
    rewards = [[e.score for e in r.rewards if e.score is not None] for r in lineage.rounds]
    return {
        **{n: {**e.metrics, "interval": interval(e.per_item)} for n, e in measured.items()},
        "rewards": [[float(np.mean(r)), float(np.std(r))] for r in rewards],
        "ledger": ledger["totals"],
        **about,
    }


if __name__ == "__main__":
    main()
