"""Generated questions: their laws over families, levels and splits; and grading by a family's own function."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfimprove.errors import ConfigError
from selfimprove.graders import Answer, Equating, Grader
from selfimprove.ledger import Ledger
from selfimprove.mathematics import MathGrader
from selfimprove.task import SPLITS, Task
from selfimprove.tasks.biographies import Biographies
from selfimprove.tasks.reasoning import REGION, OwnScore, ReasoningGym
from selfimprove.testing import GraderContract, TaskContract

DIGITS = [{"min_digits": 1, "max_digits": 1}, {"min_digits": 1, "max_digits": 2}, {"min_digits": 2, "max_digits": 3}]


def products(**changes: Any) -> ReasoningGym:
    return ReasoningGym(**{"family": "products", "levels": DIGITS, "train": 30, "validation": 9, "test": 12, **changes})


class TestProductsContract(TaskContract):
    def make_plugin(self) -> Task:
        return products()


class TestCurriculumContract(TaskContract):
    def make_plugin(self) -> Task:
        return ReasoningGym("gcd", levels=[0, 2], train=10, validation=4, test=6)


class TestOwnScoreContract(GraderContract):
    TASK = products(train=2, validation=1, test=1)
    GRADER = OwnScore(TASK)

    def make_plugin(self) -> Grader:
        return self.GRADER

    def right(self) -> Answer:
        [made, _] = self.TASK.made("train")
        return Answer(made.question, (made.answer,), f"I think.\nAnswer: {made.answer}")

    def wrong(self) -> Answer:
        [made, _] = self.TASK.made("train")
        return Answer(made.question, (made.answer,), f"{made.answer} is not what I say\n-1")

    def test_hostile_answers(self) -> None:
        right = self.right()
        for text in ("", " \n", "\x00", "9**9**9**9", "a" * 10_000, "\ud800", "[[[((("):
            assert self._graded([Answer(right.question, right.gold, text)]) == [0.0]


@settings(max_examples=5)
@given(st.integers(0, 2**40))
def test_no_question_is_in_two_splits_and_none_twice(seed: int) -> None:
    task = products(seed=seed)
    texts = [i.questions[0].text for split in SPLITS for i in task.items(split)]
    assert len(set(texts)) == len(texts)


def test_a_split_does_not_need_another() -> None:
    """Disjoint without being compared: the sealed questions are never made by a run."""
    task, whole = products(), products()
    for split in reversed(SPLITS):
        whole.made(split)
    assert task.made("train") == whole.made("train")
    assert set(task._splits) == {"train"}


def test_seeds_of_splits_are_far_apart() -> None:
    for seed in range(5):
        for at, split in enumerate(SPLITS):
            for made in products(seed=seed).made(split):
                assert at * REGION <= made.source.seed + made.source.index < (at + 1) * REGION


def test_levels_take_turns_and_get_harder() -> None:
    task = products()
    items = task.items("train")
    assert [i.level for i in items[:6]] == [0, 1, 2, 0, 1, 2]
    answers = task.answers("train")
    largest = [max(int(answers[i.questions[0].id][0]) for i in items if i.level == level) for level in range(3)]
    assert largest[0] <= 81 < largest[1] <= 99 * 99 < largest[2]
    assert not any(i.context or i.title for i in items)


def test_asking_for_more_changes_nobody() -> None:
    few, many = products(train=9), products(train=33, validation=12, test=20)
    assert many.items("train")[:9] == few.items("train")
    assert few.fingerprint("train") != many.fingerprint("train")
    assert products(seed=1).fingerprint("test") != products().fingerprint("test")


def test_math_verify_grades_arithmetic_as_the_family_does() -> None:
    task = products()
    for made in task.made("train")[:9]:
        said = [f"It is {made.answer}.", f"Answer: {int(made.answer) + 1}"]
        asked = [Answer(made.question, (made.answer,), t) for t in said]
        assert MathGrader().grade(asked, Ledger()) == [1.0, 0.0]
        assert OwnScore(task).grade([Answer(made.question, (made.answer,), f"Answer: {made.answer}")], Ledger()) == [1.0]


def test_a_family_that_accepts_many_answers() -> None:
    """Countdown: any expression that makes the target is right, and its own scorer reads it; containing the answer is not enough."""
    task = ReasoningGym("countdown", options={"min_numbers": 3, "max_numbers": 3}, train=2, validation=1, test=1)
    grader = OwnScore(task)
    made = task.made("train")[0]
    said = [made.answer, f"Answer: 0 + ({made.answer}) * 1 - 0", f"({made.answer})", f"Answer: {made.answer} + 1", "Answer: __import__('os')"]
    grades = grader.grade([Answer(made.question, (made.answer,), t) for t in said], Ledger())
    assert grades[0] == grades[2] == 1.0
    assert grades[3:] == [0.0, 0.0]


def test_answers_that_read_the_same_are_equal_in_a_vote() -> None:
    grader = OwnScore(products(train=1, validation=1, test=1))
    assert isinstance(grader, Equating)
    a, b, c, d = grader.classes(["Answer: True  dat", "so: \nTRUE dat.", "false", ""])
    assert a == b != c
    assert d is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "productz"}, "is no family of reasoning-gym; did you mean products"),
        ({"levels": []}, "at least one level"),
        ({"levels": [{"min_digit": 1}]}, r"task\.levels\[0\]: reasoning-gym's products does not take"),
        ({"levels": [{"min_digits": 5, "max_digits": 2}]}, "max_digits must be >= min_digits"),
        ({"levels": [-1]}, "no such level"),
        ({"train": -1}, "give 0 or more"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        products(**options)


def test_a_family_that_runs_out_of_questions_says_so() -> None:
    with pytest.raises(ConfigError, match=r"only \d\d different questions for train at level 0; lower task\.train"):
        products(levels=DIGITS[:1], train=90).items("train")


@pytest.mark.parametrize("seed", range(5))
def test_an_easy_level_gets_what_a_harder_one_could_do_without(seed: int) -> None:
    """Of products of one-digit factors 38 are of the test split, and the harder level draws some of them."""
    made = products(levels=DIGITS[:2], test=60, seed=seed).made("test")
    assert [m.level for m in made] == [0, 1] * 30
    assert len({m.question for m in made}) == 60


@pytest.mark.parametrize("family", ["propositional_logic", "graph_color"])
def test_a_family_whose_scorer_refuses_its_own_answers(family: str) -> None:
    with pytest.raises(ConfigError, match="does not accept the answers that it gives itself"):
        ReasoningGym(family, train=2).items("train")


def test_other_tasks_have_no_own_score() -> None:
    with pytest.raises(ConfigError, match="Choose grader=math"):
        OwnScore(Biographies())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no question of its task"):
        OwnScore(products(train=1, validation=1, test=1)).grade([Answer("Who?", ("x",), "x")], Ledger())
