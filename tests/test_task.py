from __future__ import annotations

import pytest

from selfimprove.errors import LabelError, SealedError
from selfimprove.ledger import Ledger
from selfimprove.task import Question, Task, TaskView
from selfimprove.testing import TaskContract, ToyTask


class TestToyTask(TaskContract):
    def make_plugin(self) -> Task:
        return ToyTask(people=12)


def test_a_view_opens_only_what_is_asked_for() -> None:
    task = ToyTask()
    view = TaskView(task, Ledger())
    assert task.opened == []
    assert view.train == view.train
    assert task.opened == [("items", "train")]
    view.labels(view.train[0].questions)
    assert task.opened == [("items", "train"), ("answers", "train")]


def test_items_hold_no_answers() -> None:
    task = ToyTask()
    view = TaskView(task, Ledger())
    gold = {g for accepted in task.answers("train").values() for g in accepted}
    assert not any(g in q.text for item in view.train for q in item.questions for g in gold)


def test_the_test_split_opens_only_where_it_is_the_evaluation_split() -> None:
    task = ToyTask()
    with pytest.raises(SealedError, match="selfimprove eval"):
        TaskView(task, Ledger()).test  # noqa: B018
    assert TaskView(task, Ledger(), evaluation_split="test").evaluation == tuple(task.items("test"))
    assert TaskView(task, Ledger()).evaluation == tuple(task.items("validation"))


def test_readers_are_nested_and_restored_after_errors() -> None:
    ledger = Ledger()
    view = TaskView(ToyTask(), ledger)
    questions = view.train[0].questions
    with view.reading_as("Outer", True):
        with pytest.raises(LabelError, match="Inner"), view.reading_as("Inner", False):
            view.labels(questions)
        assert set(view.labels(questions)) == {q.id for q in questions}
    assert ledger.totals["labels"] == len(questions)


def test_a_question_of_no_opened_split_is_named_and_not_charged() -> None:
    ledger = Ledger()
    view = TaskView(ToyTask(), ledger)
    known = view.train[0].questions[0]
    with pytest.raises(KeyError, match="'x' is in none of the opened splits"):
        view.labels([known, Question("x", "?")])
    assert ledger.totals["labels"] == 0
