"""The policy of a few numbers: an engine by contract, whose derivatives are those of a language model's losses."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfimprove.errors import ConfigError
from selfimprove.ledger import Ledger
from selfimprove.models import Document, Generate, Lora, Models, Objective, Pair, Prefer, Reinforce, Sample, Score, Train
from selfimprove.policy_gradient import PolicyGradient
from selfimprove.rewarders import Verifier
from selfimprove.rollouts import PassAtK, Rollouts
from selfimprove.testing import EngineContract, TabularEngine, ToyTask, toy_session

FACTS = {"one?": "red", "two?": "green", "three?": "blue"}
LORA = Lora(1, 1, ("table",), learning_rate=0.5, epochs=1)


class TestContract(EngineContract):
    prompts: Sequence[str] = ("one? red", "two? green", "three? blue")

    def make_plugin(self) -> Any:
        return TabularEngine(FACTS, skill=3.0)


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(TabularEngine(FACTS, skill=1.0), tmp_path, Ledger())


def probabilities(models: Models, policy: Any, question: str) -> np.ndarray:
    found = models.score([Score(policy, question, a) for a in FACTS.values()])
    return np.exp([x.logprob for x in found])


def test_a_policy_is_a_distribution_over_answers(models: Models) -> None:
    asked = probabilities(models, models.root, "What is one?")
    assert asked == pytest.approx(np.exp([1, 0, 0]) / (np.e + 2))
    drawn = [c.text for c in models.generate([Generate(models.root, "one?", 4, seed=i) for i in range(400)])]
    assert drawn.count("red") / 400 == pytest.approx(asked[0], abs=0.08)


def test_a_step_of_training_is_the_gradient_of_cross_entropy(models: Models) -> None:
    before = probabilities(models, models.root, "two?")
    [trained] = models.train([Train(models.root, (Document("blue", prompt="two?"),), LORA)])
    after = np.log(probabilities(models, trained.policy, "two?"))
    moved = np.array([0, 1, 0]) + 0.5 * (np.array([0, 0, 1]) - before)
    assert after == pytest.approx(moved - np.log(np.exp(moved).sum()), abs=1e-6)
    assert probabilities(models, trained.policy, "one?") == pytest.approx(probabilities(models, models.root, "one?"))


def test_reinforced_answers_become_likelier_and_a_step_goes_on_from_the_last(models: Models) -> None:
    [c] = models.generate([Generate(models.root, "three?", 4, seed=1, logprobs=True)])
    sample = Sample("three?", c.text, c.ids, c.logprobs, (1.0, 1.0), (1.0, 0.0))
    before = policy = models.root
    optimizer = None
    for _ in range(3):
        [step] = models.reinforce([Reinforce(policy, (sample,), LORA, Objective(clip_high=9.0), optimizer)])
        policy, optimizer = step.policy, step.optimizer
        at = list(FACTS.values()).index(c.text)
        assert probabilities(models, policy, "three?")[at] > probabilities(models, before, "three?")[at]
        before = policy


def test_preferring_raises_the_chosen_answer_above_the_rejected_one(models: Models) -> None:
    trl = Lora(1, 1, ("table",), learning_rate=5.0, epochs=5, trainer="trl")
    [made] = models.prefer([Prefer(models.root, models.root, (Pair("one?", "blue", "red"),), trl, beta=1.0)])
    asked = probabilities(models, made.policy, "one?")
    assert asked[2] > asked[0]


def test_a_policy_gradient_learns_the_truth_within_a_second_or_two(tmp_path: Path) -> None:
    task = ToyTask()
    roles = {
        "editor": Rollouts({"template": "{question}", "max_tokens": 4}, prompts=0, samples=8),  # type: ignore[arg-type]
        "rewarder": Verifier(),
        "updater": PolicyGradient(Lora(1, 1, ("table",), learning_rate=3.0, epochs=1)),
        "evaluator": PassAtK(4),
    }
    one = toy_session(tmp_path, rounds=10, engine=TabularEngine(task.facts), task=task, **roles)
    begun = time.monotonic()
    lineage = one.improve()
    rewards = [np.mean([r.score for r in x.rewards if r.score is not None]) for x in lineage.rounds]
    assert rewards[0] < 0.3 < 0.8 < np.mean(rewards[-3:])
    assert time.monotonic() - begun < 30


def test_a_table_needs_facts() -> None:
    with pytest.raises(ConfigError, match="ToyTask"):
        TabularEngine({})
