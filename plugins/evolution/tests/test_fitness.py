"""Any rewarder of rollouts makes a fitness, all members meet the same questions and random numbers, and halving never favours luck."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove import Candidate, Edit, Evaluation, Lineage, Run, Trial, hookimpl
from selfimprove.errors import AdmissionError, ConfigError
from selfimprove.graders import Exact
from selfimprove.models.api import Completion, Generate
from selfimprove.models.layer import Weights
from selfimprove.payloads import Noise, Rollout
from selfimprove.rewarders import Chance, Verifier
from selfimprove.rollouts import Asking
from selfimprove.session import Session
from selfimprove.testing import RewarderContract, ScriptedEngine, ToyTask, toy_session
from selfimprove_evolution import AnswerLikelihood, EvolutionStrategy, Fitness, SuccessiveHalving, WeightNoise
from selfimprove_label_free import SelfCertainty
from selfimprove_srt import MajorityVote

ASKING: Any = {"template": "{question}", "chat": False, "max_tokens": 8}


def session(folder: Path, rewarder: Any, engine: Any = None) -> Session:
    editor = WeightNoise(6, 0.01, 1, True, ("q_proj",))
    return toy_session(
        folder, engine=engine, grader=Exact(), editor=editor, rewarder=rewarder, updater=EvolutionStrategy({"learning_rate": 1.0}), evaluator=None
    )


def rewarded(folder: Path, rewarder: Any, engine: Any = None) -> tuple[Sequence[Trial], Sequence[Evaluation], Session]:
    one = session(folder, rewarder, engine)
    edits = one.hook.propose(parents=[one.lineage.root], lineage=one.lineage, run=one.run)
    trials = one.hook.apply(edits=edits, lineage=one.lineage, run=one.run)
    return trials, one.hook.reward(trials=trials, lineage=one.lineage, run=one.run), one


class _Contract(RewarderContract):
    def make_session(self, folder: Path) -> Session:
        return session(folder, self.make_plugin())

    def make_bad_trials(self, session: Session) -> Sequence[Trial]:
        root = session.lineage.root
        return [Trial(Edit((root.id,), Noise(1)), root.derive("bad", 0), error="it made nothing")]


class TestFitness(_Contract):
    def make_plugin(self) -> Any:
        return Fitness(Verifier(), ASKING, 3, 2)


class TestLikelihood(_Contract):
    def make_plugin(self) -> Any:
        return AnswerLikelihood(ASKING, 3)


class TestHalving(_Contract):
    order_free = False  # of equals, the first go on

    def make_plugin(self) -> Any:
        return SuccessiveHalving(Fitness(Verifier(), ASKING, 6), 2, 2)


@pytest.mark.parametrize("inner", [Verifier, MajorityVote, SelfCertainty, Chance])
def test_any_rewarder_of_rollouts_makes_a_fitness(tmp_path: Path, inner: Any) -> None:
    _, found, one = rewarded(tmp_path, Fitness(inner(), ASKING, 0, 3, 1.0))
    assert all(e.score is not None and {"tokens", "finished", "distinct"} == e.metrics.keys() for e in found)
    assert (one.run.ledger.totals["labels"] > 0) == (inner is Verifier)


def test_a_fitness_is_the_mean_over_questions(tmp_path: Path) -> None:
    """The scripted model's noise knows one fact each, so it answers one question of six at most."""
    trials, found, _ = rewarded(tmp_path, Fitness(Verifier(), ASKING, 0))
    for t, e in zip(trials, found, strict=True):
        assert e.score == sum(e.per_item.values()) / 6
        assert e.score in ((0, 1 / 6) if t.edit.payload.sign > 0 else (0,))


class _Watched(ScriptedEngine):
    def __init__(self) -> None:
        super().__init__(facts=ToyTask().facts)
        self.seen: list[Generate] = []

    def generate(self, tile: Sequence[Generate], weights: Weights) -> tuple[list[Completion], dict[str, float]]:
        self.seen += tile
        return super().generate(tile, weights)


def test_all_members_meet_the_same_questions_and_random_numbers(tmp_path: Path) -> None:
    engine = _Watched()
    rewarded(tmp_path, Fitness(Verifier(), ASKING, 2, 3, 1.0), engine)
    by_member: dict[str, set[tuple[str, int]]] = {}
    for r in engine.seen:
        by_member.setdefault(r.policy.digest, set()).add((r.prompt, r.seed))
    assert len(by_member) == 6
    assert len({frozenset(asked) for asked in by_member.values()}) == 1
    assert all(len(asked) == len({seed for _, seed in asked}) == 6 for asked in by_member.values())


@pytest.mark.parametrize("make", [lambda levels: Fitness(Verifier(), ASKING, 0, levels=levels), lambda levels: AnswerLikelihood(ASKING, 0, levels)])
def test_a_fitness_goes_by_levels(tmp_path: Path, make: Any) -> None:
    one = session(tmp_path, make([0]))
    assert len(one.run.roles["rewarder"].questions(one.lineage, one.run)) == 6
    with pytest.raises(ConfigError, match="no training question"):
        session(tmp_path / "none", make([-1]))


def test_rounds_take_turns_with_the_questions(tmp_path: Path) -> None:
    rewarder = Fitness(Verifier(), ASKING, 3)
    one = session(tmp_path, rewarder)
    minibatches = [{q.id for _, q in rewarder.rollouts.questions(one.run, n)} for n in range(2)]
    assert len(minibatches[0]) == len(minibatches[1]) == 3
    assert not minibatches[0] & minibatches[1]


def test_what_no_rewarder_can_measure_has_no_fitness(tmp_path: Path) -> None:
    _, found, _ = rewarded(tmp_path, Fitness(MajorityVote(), ASKING, 0), ScriptedEngine(script={"": ""}))
    assert all(e.score is None and e.error and "no rollout of the question holds an answer" in e.error for e in found)


# ---- halving ----


class _Table:
    """A fitness whose values are given: by member and question."""

    asking = Asking()

    def __init__(self, table: Sequence[Sequence[float]]) -> None:
        self.table, self.asked = table, 0

    def questions(self, lineage: Lineage, run: Run) -> Any:
        return [(None, n) for n in range(len(self.table[0]))]

    def measure(self, trials: Sequence[Trial], asked: Any, lineage: Lineage, run: Run) -> list[Evaluation]:
        self.asked += len(trials) * len(asked)
        rows = [{str(n): self.table[t.edit.payload.seed][n] for _, n in asked} for t in trials]
        return [Evaluation(sum(row.values()) / len(row), per_item=row) for row in rows]

    @hookimpl
    def reward(self, trials: Sequence[Trial]) -> Sequence[Evaluation]:
        raise NotImplementedError


def halved(table: Sequence[Sequence[float]], first: int, eta: int) -> tuple[list[Evaluation], int]:
    inner = _Table(table)
    trials = [Trial(Edit(("p",), Noise(i)), Candidate(str(i), {})) for i in range(len(table))]
    nothing: Any = None
    return list(SuccessiveHalving(inner, first, eta).reward(trials, nothing, nothing)), inner.asked


def test_halving_by_hand() -> None:
    table = [[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 1]]
    found, asked = halved(table, 1, 2)
    assert [len(e.per_item) for e in found] == [1, 3, 4, 1]  # 1 of four, then 2 of the better two, then 1 of the best
    assert [e.metrics["own"] for e in found] == [0, pytest.approx(2 / 3), 1, 0]
    assert asked == 4 + 2 * 2 + 1


@given(
    st.integers(1, 9).flatmap(lambda n: st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=n, max_size=n), min_size=1, max_size=12)),
    st.integers(1, 4),
    st.integers(2, 3),
)
def test_who_was_ended_is_never_above_who_went_on(table: list[list[float]], first: int, eta: int) -> None:
    found, asked = halved(table, first, eta)
    assert asked <= len(table) * len(table[0])
    for one in found:
        assert one.score is not None
        assert one.score <= one.metrics["own"]
        for other in found:
            assert other.score is not None
            if len(one.per_item) < len(other.per_item):
                assert one.score <= other.score
    longest = max(len(e.per_item) for e in found)
    assert longest == len(table[0])
    assert all(e.score == e.metrics["own"] for e in found if len(e.per_item) == longest)


@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 5), st.integers(2, 4))
def test_what_halving_asks_is_foreseen(members: int, questions: int, first: int, eta: int) -> None:
    _, asked = halved([[float(i)] * questions for i in range(members)], first, eta)
    assert asked == SuccessiveHalving(_Table([]), first, eta).asked(members, questions)


def test_a_plan_is_told_the_most_that_halving_costs(tmp_path: Path) -> None:
    fitness = Fitness(Verifier(), ASKING, 6)
    _, _, one = rewarded(tmp_path, SuccessiveHalving(fitness, 2, 2))
    whole, expected = fitness.expected(one.run), one.run.roles["rewarder"].expected(one.run)
    share = (6 * 2 + 3 * 4) / (6 * 6)  # all of 6 members on 2 questions, then 3 on the other 4
    assert whole["generated_tokens"] > 0
    assert expected == {unit: pytest.approx(amount * share) for unit, amount in whole.items()}


# ---- refusals ----


def test_what_is_no_fitness_is_refused() -> None:
    with pytest.raises(AdmissionError, match="wants a rewarder of rollouts"):
        Fitness(type("OfNoise", (Chance,), {"consumes": (Noise,)})(), ASKING)
    with pytest.raises(AdmissionError, match="`questions` and `measure`"):
        SuccessiveHalving(Verifier())
    with pytest.raises(ConfigError, match="first >= 1"):
        SuccessiveHalving(AnswerLikelihood(ASKING), 0)
    with pytest.raises(ConfigError, match="temperature"):
        Fitness(Verifier(), ASKING, temperature=-1)
    for uncached in (Fitness(Verifier(), ASKING), SuccessiveHalving(Fitness(Verifier(), ASKING))):
        with pytest.raises(AdmissionError, match="cannot be cached"):
            uncached.key()


def test_a_fitness_consumes_any_candidate_and_the_inner_rewarder_rollouts() -> None:
    assert Fitness(Verifier(), ASKING).consumes is None
    assert Verifier.consumes == (Rollout,)
    assert Fitness(Verifier(), ASKING).uses_labels
    assert not Fitness(Chance(), ASKING).uses_labels
