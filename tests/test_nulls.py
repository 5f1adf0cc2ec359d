from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove import Edit, Evaluation, Lineage, hookimpl
from selfimprove.errors import ConfigError
from selfimprove.finetuning import SFT
from selfimprove.identity import rng
from selfimprove.models import Generate
from selfimprove.nulls import METHODS, GoldAnswers, ShuffledEdits, ShuffledRewards, Unedited, Untouched
from selfimprove.payloads import Rollout, Text, payload
from selfimprove.records import Candidate, Part
from selfimprove.rewarders import Chance
from selfimprove.rollouts import Asking
from selfimprove.session import Session
from selfimprove.testing import EditorContract, EvaluatorContract, NoopEditor, ScriptedEngine, ToyEvaluator, ToyTask, toy_session

ASKING = Asking(max_tokens=8)
LORA = {"rank": 1, "alpha": 1, "targets": ["q_proj"], "learning_rate": 1.0, "epochs": 1}


class TestUnedited(EditorContract):
    def make_plugin(self) -> Unedited:
        return Unedited(ASKING)


class TestGoldAnswers(EditorContract):
    def make_plugin(self) -> GoldAnswers:
        return GoldAnswers(ASKING, prompts=2, samples=1)


class TestUntouched(EvaluatorContract):
    def make_plugin(self) -> Untouched:
        return Untouched("greedy")

    def make_roles(self) -> dict[str, Any]:
        return {"editor": Unedited(ASKING)}


def answering(request: Generate, known: Sequence[Any]) -> str:
    """Right in one of three samples, always with one of the two wrong answers otherwise."""
    gold = ToyTask().facts[request.prompt]
    return gold if request.temperature == 0 or (request.temperature > 0.5 and request.seed % 3) else f"wrong {request.seed % 2}"


def opened(folder: Path, engine: ScriptedEngine | None = None, **arguments: Any) -> Session:
    """A finished session that measured the untouched model."""
    roles: dict[str, Any] = {"editor": Unedited(ASKING), "rewarder": Chance(1.0), "updater": None, "evaluator": Untouched(**arguments)}
    session = toy_session(folder, rounds=1, engine=engine or ScriptedEngine(answering, name="third"), **roles)
    session.improve()
    return session


def measured(folder: Path, **arguments: Any) -> Evaluation:
    lineage = opened(folder, **arguments).lineage
    [(root, found)] = lineage.round(0).scores
    assert root == lineage.root.id
    return found


def again(folder: Path, **arguments: Any) -> Evaluation:
    """What the finished run's evaluator says when it is asked once more, as the opening of the sealed test does."""
    session = opened(folder, **arguments)
    [(_, found)] = session.hook.evaluate(candidates=[session.lineage.root], trials=[], rewards=[], lineage=session.lineage, run=session.run)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_every_way_of_decoding_grades_every_question(method: str, tmp_path: Path) -> None:
    found = measured(tmp_path, method=method)
    questions = set(found.per_item)
    assert questions == {q.id for i in ToyTask().items("validation") for q in i.questions}
    assert found.score == pytest.approx(sum(found.per_item.values()) / len(questions))


def test_the_best_temperature_is_chosen_once_and_recorded(tmp_path: Path) -> None:
    found = measured(tmp_path / "run", method="best_temperature", temperatures=(0.1, 0.9))
    assert found.metrics["temperature"] == 0.9
    assert again(tmp_path / "again", method="best_temperature", temperatures=(0.1, 0.9)).metrics["temperature"] == 0.9


def test_the_test_takes_as_many_samples_as_the_rest_of_the_budget_pays_for(tmp_path: Path) -> None:
    assert measured(tmp_path / "run", method="majority", samples=1, budget={"generated_tokens": 1e9}).metrics["samples"] == 1
    assert again(tmp_path / "none", method="majority", samples=3).metrics["samples"] == 3
    assert again(tmp_path / "most", method="majority", samples=1, most=5, budget={"generated_tokens": 1e9}).metrics["samples"] == 5
    budget = {"generated_tokens": 100.0}
    session = opened(tmp_path / "some", method="majority", samples=1, budget=budget)
    [(_, found)] = session.hook.evaluate(candidates=[session.lineage.root], trials=[], rewards=[], lineage=session.lineage, run=session.run)
    assert 1 < found.metrics["samples"] < 64
    assert session.run.ledger.totals["generated_tokens"] == pytest.approx(100, rel=0.25)


class Reading(ScriptedEngine):
    """Reads each question of a tile once, which costs ten times what an answer does."""

    def generate(self, tile: Sequence[Generate], weights: Any) -> tuple[list[Any], dict[str, float]]:
        found, charges = super().generate(tile, weights)
        return found, {**charges, "flops": 1.0 * len(tile) + 10.0 * len({r.prompt for r in tile})}


def test_answers_that_share_their_question_are_paid_for_as_such(tmp_path: Path) -> None:
    session = opened(tmp_path, Reading(answering, name="reading"), method="majority", samples=1, budget={"flops": 600.0})
    assert session.run.ledger.totals["flops"] < 300
    [(_, found)] = session.hook.evaluate(candidates=[session.lineage.root], trials=[], rewards=[], lineage=session.lineage, run=session.run)
    assert 1 < found.metrics["samples"] < 64
    assert session.run.ledger.totals["flops"] == pytest.approx(600, rel=0.15)


def test_supervised_training_learns_the_gold_answers_and_pays_for_the_labels(tmp_path: Path) -> None:
    roles: dict[str, Any] = {"editor": GoldAnswers(ASKING, 0, 1), "rewarder": Chance(1.0), "updater": SFT(LORA), "evaluator": ToyEvaluator()}
    session = toy_session(tmp_path, rounds=1, **roles)
    lineage = session.improve()
    questions = [q for i in session.run.task.train for q in i.questions]
    asked = session.run.models.generate([Generate(lineage.latest.parts["policy"], q.text, 8, 0.0) for q in questions])
    assert [c.text for c in asked] == [ToyTask().facts[q.text] for q in questions]
    assert session.run.ledger.totals["labels"] >= len(questions)


@dataclasses.dataclass
class Given:
    """Proposes fixed edits."""

    edits: Sequence[Edit]

    @hookimpl
    def propose(self) -> Sequence[Edit]:
        return self.edits


def shuffled(edits: Sequence[Edit]) -> list[Edit]:
    wrapped = ShuffledEdits().propose(Lineage(Candidate.root(policy=Part("model", "m"))), Streams())  # type: ignore[arg-type]
    next(wrapped)
    with pytest.raises(StopIteration) as done:
        wrapped.send(edits)
    return list(done.value.value)


@given(st.lists(st.integers(1, 3), min_size=2, max_size=5))
def test_shuffled_edits_say_what_another_group_said_and_keep_what_they_were_asked(sizes: list[int]) -> None:
    edits = [Edit(("p",), Text(f"{g}-{k}", f"prompt {g}", f"item {g}"), str(g)) for g, n in enumerate(sizes) for k in range(n)]
    changed = shuffled(edits)
    for before, after in zip(edits, changed, strict=True):
        assert (after.group, after.payload.prompt, after.payload.item) == (before.group, before.payload.prompt, before.payload.item)
        assert after.payload.text.split("-")[0] != before.group
    if len(set(sizes)) == 1:
        assert sorted(e.payload.text for e in changed) == sorted(e.payload.text for e in edits)


def test_a_rollout_moves_with_its_tokens() -> None:
    edits = [Edit(("p",), Rollout(str(g), f"q{g}", question=f"q{g}", ids=(g,), logprobs=(-float(g),)), str(g)) for g in range(3)]
    for after in shuffled(edits):
        assert (str(after.payload.ids[0]), after.payload.logprobs[0]) == (after.payload.text, -float(after.payload.text))
        assert after.payload.question == f"q{after.group}"


class Streams:
    def rng(self, *name: Any) -> Any:
        return rng(0, *name)


@given(st.lists(st.none() | st.tuples(st.floats(-9, 9, allow_subnormal=False), st.lists(st.integers(0, 9), max_size=4)), max_size=9))
def test_shuffled_rewards_are_the_same_ones_elsewhere(given_: list[Any]) -> None:
    before = [Evaluation.failed("why") if g is None else Evaluation(g[0], {"m": g[0]}, {"i": g[0]}, tuple(map(float, g[1]))) for g in given_]
    wrapped = ShuffledRewards().reward(Lineage(Candidate.root()), Streams())  # type: ignore[arg-type]
    next(wrapped)
    with pytest.raises(StopIteration) as done:
        wrapped.send(before)
    after: list[Evaluation] = list(done.value.value)
    for one, other in zip(before, after, strict=True):
        assert (one.error, len(one.credit)) == (other.error, len(other.credit))
        assert not other.metrics
        assert not other.per_item, "nothing else says what was measured"
    assert sorted(e.score for e in after if e.score is not None) == sorted(e.score for e in before if e.score is not None)
    assert sorted(c for e in after for c in e.credit) == sorted(c for e in before for c in e.credit)


def test_shuffled_rewards_move() -> None:
    wrapped = ShuffledRewards().reward(Lineage(Candidate.root()), Streams())  # type: ignore[arg-type]
    next(wrapped)
    with pytest.raises(StopIteration) as done:
        wrapped.send([Evaluation(float(n), credit=(float(n), -float(n))) for n in range(50)])
    assert sum(e.score == n for n, e in enumerate(done.value.value)) < 10
    assert sum(e.credit == (n, -n) for n, e in enumerate(done.value.value)) < 10


@payload("noise for a test of null arms")
@dataclasses.dataclass(frozen=True)
class Noise:
    seed: int


def test_edits_without_text_are_refused() -> None:
    wrapped = ShuffledEdits().propose(Lineage(Candidate.root()), None)  # type: ignore[arg-type]
    next(wrapped)
    with pytest.raises(ConfigError, match="these edits are Noise"):
        wrapped.send([Edit(("p",), Noise(1))])


@pytest.mark.parametrize("bad", [{"method": "gready"}, {"samples": 0}, {"temperatures": ()}, {"budget": {"flop": 1}}, {"samples": 9, "most": 4}])
def test_bad_arguments_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="evaluator"):
        Untouched(**bad)


def test_an_editor_that_asks_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="asks as the editor or rewarder does"):
        toy_session(tmp_path, rounds=1, editor=NoopEditor(), evaluator=Untouched()).improve()
