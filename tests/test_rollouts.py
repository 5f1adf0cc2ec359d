"""The editor of rollouts and the evaluator of pass@k keep their contracts; curricula; the estimator by enumeration."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove.errors import ConfigError
from selfimprove.hooks import hookimpl
from selfimprove.identity import rng
from selfimprove.models import Lora
from selfimprove.payloads import Rollout
from selfimprove.policy_gradient import PolicyGradient
from selfimprove.records import Edit
from selfimprove.rollouts import Asking, PassAtK, Rollouts, pass_at_k, replies
from selfimprove.run import Run
from selfimprove.session import Session
from selfimprove.task import Item, Question
from selfimprove.testing import EditorContract, EvaluatorContract, ScriptedEngine, ToyTask, toy_session

ASKING = {"template": "{title}: {context}\n{question}", "max_tokens": 16}
UPDATER = PolicyGradient(Lora(1, 1, ("q_proj",), 1.0, 1))


class Even:
    consumes = (Rollout,)

    @hookimpl
    def reward(self, trials: Any) -> Any:
        from selfimprove.records import Evaluation

        return [Evaluation(float(i % 2)) for i, _ in enumerate(trials)]


def session(folder: Path, task: Any = None, **editor: Any) -> Session:
    roles = {"rewarder": Even(), "updater": UPDATER, "evaluator": PassAtK(3)}
    return toy_session(folder, task=task, editor=Rollouts(**{"asking": ASKING, "prompts": 2, "samples": 3, **editor}), **roles)


class TestRollouts(EditorContract):
    def make_plugin(self) -> Any:
        return Rollouts(ASKING, prompts=2, samples=3)  # type: ignore[arg-type]

    def make_roles(self) -> dict[str, Any]:
        return {"rewarder": Even(), "updater": UPDATER, "evaluator": PassAtK(2)}

    def make_bad_edits(self, session: Session) -> list[Edit]:
        return [Edit((session.lineage.root.id,), Rollout(text), "odd") for text in ("", "\x00", "\ud800")]


class TestPassAtK(EvaluatorContract):
    def make_plugin(self) -> Any:
        return PassAtK(2)

    def make_roles(self) -> dict[str, Any]:
        return {"rewarder": Even(), "updater": UPDATER, "editor": Rollouts(ASKING, prompts=2, samples=2)}  # type: ignore[arg-type]


def test_a_rollout_says_all_that_a_gradient_needs(tmp_path: Path) -> None:
    one = session(tmp_path)
    edits = one.hook.propose(parents=[one.lineage.root], lineage=one.lineage, run=one.run)
    assert len(edits) == 6
    assert len({e.group for e in edits}) == 2
    for payload in (e.payload for e in edits):
        assert len(payload.ids) == len(payload.logprobs) > 0
        assert payload.prompt.endswith("?")
        assert payload.chat is True


def test_questions_take_turns(tmp_path: Path) -> None:
    one = session(tmp_path, prompts=2)
    editor = one.run.roles["editor"]
    asked = [q.id for number in range(3) for _, q in editor.questions(one.run, number)]
    assert sorted(asked) == sorted(q.id for i in one.run.task.train for q in i.questions), "six questions, each once in three rounds"


def test_prompts_zero_asks_everything(tmp_path: Path) -> None:
    one = session(tmp_path, prompts=0)
    assert len(one.run.roles["editor"].questions(one.run, 0)) == 6


class Leveled(ToyTask):
    """Every question an item of a level of its own."""

    def items(self, split: Any) -> Any:
        return [Item(q.id, i.title, i.context, (Question(q.id, q.text),), n) for i in super().items(split) for n, q in enumerate(i.questions)]


def test_a_curriculum_opens_levels_round_by_round(tmp_path: Path) -> None:
    one = session(tmp_path, task=Leveled(), prompts=0, levels=[0, 0, 2])
    editor = one.run.roles["editor"]
    assert [max(i.level for i, _ in editor.questions(one.run, n)) for n in range(4)] == [0, 0, 2, 2]


def test_a_level_without_questions_is_refused_before_the_first_round(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"raise task.train or levels"):
        session(tmp_path, task=Leveled(), levels=[-1])


@given(st.integers(1, 7), st.data())
def test_pass_at_k_counts_the_choices_that_hold_a_right_answer(n: int, data: st.DataObject) -> None:
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    choices = list(itertools.combinations([i < right for i in range(n)], k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_metrics_and_pairing(tmp_path: Path) -> None:
    one = session(tmp_path)
    lineage = one.improve()
    [(first, evaluation), *_] = lineage.round(0).scores
    assert first == lineage.root.id
    assert {"pass_at_1", "pass_at_3", "greedy", "no_answer"} == evaluation.metrics.keys()
    assert evaluation.metrics["pass_at_1"] <= evaluation.metrics["pass_at_3"]
    assert len(evaluation.per_item) == 6


def test_an_editor_that_asks_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="editor=rollouts"):
        toy_session(tmp_path, evaluator=PassAtK(2)).improve()


@pytest.mark.parametrize("change", [{"template": "x"}, {"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}])
def test_askings_that_cannot_work(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Asking(**change)


@pytest.mark.parametrize("change", [{"samples": 0}, {"prompts": -1}])
def test_sizes_that_cannot_work(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at least|>="):
        Rollouts(**{"asking": ASKING, **change})


@given(st.text(), st.text())
def test_a_filled_field_is_not_searched(question: str, context: str) -> None:
    asking = Asking("{context}|{question}|{other} {{x}}")
    asked = Item("i", "", "{question}" + context, (Question("q", question),))
    assert asking.prompt(asked, asked.questions[0]) == f"{{question}}{context}|{question}|{{other}} {{{{x}}}}"


def test_a_candidate_is_asked_under_its_own_instruction(tmp_path: Path) -> None:
    script = {"Shout. Where": "LOUD", "Where": "quiet"}
    one = session(tmp_path, asking={"template": "{instruction} {question}"})
    one.run.models.engine = ScriptedEngine(script)
    root, loud = one.lineage.root, one.lineage.root.derive("loud", prompt=one.run.blobs.write("text", "Shout."))
    asked = [(i, q) for i in one.run.task.train for q in i.questions if q.text.startswith("Where")]
    rows = replies(one.run, [(root, asked), (loud, asked[:1]), (root, [])], samples=2)
    assert [[a.text for a in row] for row in rows] == [["quiet"] * 2 * len(asked), ["LOUD", "LOUD"], []]
    assert all(a.gold in one.run.task.labels([a.question])[a.question.id] for row in rows for a in row)


@given(st.integers(1, 9), st.integers(0, 12), st.integers(0, 5))
def test_turns_go_through_the_whole_pool(size: int, count: int, number: int) -> None:
    run: Any = SimpleNamespace(rng=lambda name: rng(3, name))
    turns = [Run.in_turn(run, "x", range(size), count, n) for n in range(number, number + size)]
    assert {len(t) for t in turns} == {min(count or size, size)}
    assert {x for t in turns for x in t} == set(range(size))
    assert all(len(set(t)) == len(t) for t in turns)
