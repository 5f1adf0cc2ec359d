"""Any rewarder as fitness, on any task of questions, by the commands that a user types."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfimprove import journal
from selfimprove.cli import main

TASKS = {
    "arithmetic": ["task=arithmetic", "grader=math"],
    "biographies": ["task=biographies", "grader=contains"],
    "reasoning": ["task=reasoning", "task.family=gcd", "grader=reasoning"],
}
SAMPLED = ["rewarder.samples=2", "rewarder.temperature=1"]
FITNESS = {
    "verifier": [],
    "majority": ["+rewarder@rewarder.inner=majority", *SAMPLED],
    "self_certainty": ["+rewarder@rewarder.inner=self_certainty", *SAMPLED],
    "token_entropy": ["+rewarder@rewarder.inner=token_entropy", *SAMPLED],
    "chance": ["+rewarder@rewarder.inner=chance"],
    "answer_likelihood": ["rewarder=answer_likelihood"],
    "halved_fitness": ["rewarder=halved_fitness", "rewarder.first=1"],
    "halved_likelihood": ["rewarder=halved_fitness", "rewarder.first=1", "rewarder/inner=answer_likelihood"],
}
PAIRS = [
    ("arithmetic", "verifier"),
    ("biographies", "verifier"),
    ("reasoning", "verifier"),
    ("arithmetic", "majority"),
    ("reasoning", "majority"),
    ("biographies", "self_certainty"),
    ("reasoning", "token_entropy"),
    ("biographies", "chance"),
    ("biographies", "answer_likelihood"),
    ("arithmetic", "answer_likelihood"),
    ("biographies", "halved_fitness"),
]
SCRIPTED = ["engine=scripted", 'engine.script={number:"7"}', "observer=[]", "evaluator=none", "guard.rounds.rounds=1"]
"""A model that answers 7 to whatever asks for a number."""
SMALL = ["editor.population=4", "task.train=4", "task.validation=2", "task.test=2"]


def prompts(fitness: str) -> str:
    return "rewarder.inner.prompts=2" if fitness.startswith("halved") else "rewarder.prompts=2"


@pytest.mark.parametrize(("task", "fitness"), PAIRS)
def test_any_rewarder_is_a_fitness_on_any_task(task: str, fitness: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    chosen = ["strategy=eggroll", *TASKS[task], *FITNESS[fitness], prompts(fitness), *SMALL, *SCRIPTED]
    assert main(["run", *chosen, f"run.folder={folder}"]) == 0, capsys.readouterr().err
    lineage, _, _ = journal.read(folder / "journal.jsonl")
    [one] = lineage.rounds
    assert len(one.rewards) == 4
    assert all(e.score is not None for e in one.rewards), [e.error for e in one.rewards]


@pytest.mark.parametrize("strategy", ["eggroll", "cma_merge"])
def test_a_plan_counts_halving(strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [f"strategy={strategy}", "rewarder=halved_fitness", "task.train=40", "task.validation=2", *SCRIPTED]
    assert main(["plan", *chosen]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "generated_tokens" in said
    assert "rewarder" not in said.rpartition("not counted")[2]
