"""Shaping is what the papers say, contracts hold, a run learns, and is the same after a kill."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove.errors import AdmissionError, ConfigError
from selfimprove.journal import lineage_digest
from selfimprove.models import Evolve, Perturb
from selfimprove.models.torch_engine import TorchEngine
from selfimprove.records import Evaluation
from selfimprove.retention import Retention
from selfimprove.rewarders import Verifier
from selfimprove.rollouts import PassAtK
from selfimprove.session import Session
from selfimprove.testing import EditorContract, ToyTask, UpdaterContract, digest_after_kill, kill_points, toy_session
from selfimprove_evolution import AnswerLikelihood, EvolutionStrategy, Fitness, WeightNoise
from selfimprove_evolution.noise import centred_ranks, z_scores

ASKING: Any = {"template": "{question}", "chat": False, "max_tokens": 8}
TARGETS = ("q_proj", "down_proj")
ASCENT: Any = {"learning_rate": 0.5}


def roles(**changes: Any) -> dict[str, Any]:
    return {
        "editor": WeightNoise(8, 0.01, 1, True, TARGETS),
        "rewarder": Fitness(Verifier(), ASKING, prompts=0),
        "updater": EvolutionStrategy(ASCENT),
        "evaluator": PassAtK(2, greedy=False),
        **changes,
    }


def session(folder: Path, **changes: Any) -> Session:
    return toy_session(folder, **roles(**changes))


class TestNoise(EditorContract):
    def make_plugin(self) -> Any:
        return WeightNoise(4, 0.01, 1, True, TARGETS)

    def make_session(self, folder: Path) -> Session:
        return session(folder, editor=self.make_plugin())


class TestStrategy(UpdaterContract):
    def make_plugin(self) -> Any:
        return EvolutionStrategy(ASCENT)

    def make_session(self, folder: Path) -> Session:
        return session(folder, updater=self.make_plugin())


# ---- shaping ----

FITNESS = st.lists(st.integers(-50, 50).map(float), min_size=2, max_size=40).filter(lambda x: len(set(x)) > 1).map(np.array)


@given(FITNESS, st.floats(0.01, 100), st.integers(-100, 100))
def test_z_scores_know_no_scale_and_no_origin(fitness: np.ndarray, scale: float, origin: int) -> None:
    assert z_scores(scale * fitness + origin) == pytest.approx(z_scores(fitness), abs=1e-6)
    assert z_scores(fitness).mean() == pytest.approx(0, abs=1e-9)
    assert z_scores(fitness).std() == pytest.approx(1)


@given(FITNESS)
def test_ranks_know_the_order_alone(fitness: np.ndarray) -> None:
    ranks = centred_ranks(fitness)
    assert (centred_ranks(fitness**3) == ranks).all()
    assert ranks.sum() == pytest.approx(0, abs=1e-9)
    assert (np.abs(ranks) <= 0.5).all()
    for a, b in zip(fitness, ranks, strict=True):
        assert ((fitness < a) == (ranks < b)).all()
        assert ((fitness == a) == (ranks == b)).all()


def test_ranks_by_hand() -> None:
    assert centred_ranks(np.array([3.0, 1.0, 2.0, 9.0, 5.0])).tolist() == [0.0, -0.5, -0.25, 0.5, 0.25]
    assert centred_ranks(np.array([1.0, 0.0, 1.0])).tolist() == [0.25, -0.5, 0.25]


# ---- population and step ----


def test_a_population_is_pairs_of_opposite_noise_in_groups_of_their_own(tmp_path: Path) -> None:
    one = session(tmp_path)
    edits = one.hook.propose(parents=[one.lineage.root], lineage=one.lineage, run=one.run)
    assert [e.payload.sign for e in edits] == [1, -1] * 4
    assert [e.payload.seed for e in edits[::2]] == [e.payload.seed for e in edits[1::2]]
    assert len({e.payload.seed for e in edits}) == len({e.group for e in edits}) == 4


def test_a_child_is_a_recipe(tmp_path: Path) -> None:
    one = session(tmp_path, updater=EvolutionStrategy(ASCENT, "centred_ranks"))
    run, lineage = one.run, one.lineage
    trials = one.hook.apply(edits=one.hook.propose(parents=[lineage.root], lineage=lineage, run=run), lineage=lineage, run=run)
    scores: list[float | None] = [1, 0, 0, None, 3, 0, 0, 9]
    rewards = [Evaluation.failed("lost") if s is None else Evaluation(s) for s in scores]
    [child] = one.hook.update(trials=trials, rewards=rewards, lineage=lineage, run=run)
    recipe = run.models.recipe(child.parts["policy"])
    assert isinstance(recipe, Evolve)
    measured = [t for t, s in zip(trials, scores, strict=True) if s is not None]
    assert recipe.members == tuple(t.candidate.parts["policy"] for t in measured)
    assert recipe.weights == pytest.approx(centred_ranks(np.array([s for s in scores if s is not None])) / 7)
    assert isinstance(run.models.recipe(recipe.members[0]), Perturb)
    assert not list(one.folder.glob("tiles/*/*.safetensors"))


def test_equal_fitness_leads_nowhere(tmp_path: Path) -> None:
    one = session(tmp_path)
    trials = one.hook.apply(edits=one.hook.propose(parents=[one.lineage.root], lineage=one.lineage, run=one.run), lineage=one.lineage, run=one.run)
    assert one.hook.update(trials=trials, rewards=[Evaluation(0.1)] * len(trials), lineage=one.lineage, run=one.run) == []


def test_a_run_learns(tmp_path: Path) -> None:
    """The scripted model's noise knows facts; those that answer questions stay."""
    lineage = toy_session(tmp_path, rounds=3, **roles(editor=WeightNoise(32, 0.01, 1, True, TARGETS))).improve()
    rewards = [np.mean([e.score for e in lineage.round(i).rewards if e.score is not None]) for i in range(3)]
    assert rewards[-1] > rewards[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_real_model_learns(tmp_path: Path, tiny: TorchEngine, rank: int) -> None:
    """Answers become likelier in real weights, by momentum, with content written every third round."""
    one = toy_session(
        tmp_path,
        rounds=7,
        engine=tiny,
        retention=Retention(every=3, best=False),
        **roles(
            editor=WeightNoise(16, 0.05, rank, True, ("q_proj", "v_proj", "down_proj", "up_proj")),
            rewarder=AnswerLikelihood(ASKING, 0),
            updater=EvolutionStrategy({"learning_rate": 0.1, "momentum": 0.5}),
            evaluator=None,
        ),
    )
    lineage = one.improve()
    means = [np.mean([e.score for e in lineage.round(i).rewards if e.score is not None]) for i in range(7)]
    assert means[-1] > means[0] + 0.1
    assert len(list(one.folder.glob("tiles/*/*.safetensors"))) == 1


def test_a_killed_run_ends_as_one_that_was_not(tmp_path: Path) -> None:
    make = partial(toy_session, rounds=2, task=ToyTask(1), **roles(editor=WeightNoise(4, 0.01, 1, True, TARGETS)))
    total = kill_points(make, tmp_path / "whole")
    whole = lineage_digest(tmp_path / "whole" / "journal.jsonl")
    for at in range(3, total, max(1, total // 5)):
        assert digest_after_kill(make, tmp_path / str(at), at) == whole


# ---- refusals ----


@pytest.mark.parametrize("wrong", [(7, 0.1, 1, True, TARGETS), (0, 0.1, 1, False, TARGETS), (4, 0.0, 1, True, TARGETS), (4, 0.1, 1, True, ())])
def test_a_population_that_cannot_be_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError):
        WeightNoise(*wrong)


def test_a_step_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="shaping is one of"):
        EvolutionStrategy(ASCENT, "tanh")
    with pytest.raises(ConfigError, match=r"updater\.ascent does not fit"):
        EvolutionStrategy({"rate": 1})
    with pytest.raises(AdmissionError, match="consumes Noise"):
        toy_session(Path("never"), updater=EvolutionStrategy(ASCENT))


def test_a_model_without_such_modules_is_refused(tmp_path: Path, tiny: TorchEngine) -> None:
    one = toy_session(tmp_path, engine=tiny, **roles(editor=WeightNoise(4, 0.01, 1, True, ("query",)), evaluator=None))
    with pytest.raises(ConfigError, match="no linear module"):
        one.improve()
