"""The grader of mathematics: what an answer is, which answers are equal, and that no text hangs or breaks it."""

from __future__ import annotations

import pickle
import signal
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove.confined import Confined
from selfimprove.errors import ConfigError
from selfimprove.graders import Answer, Contains, Equating, Exact, Grader, equating
from selfimprove.ledger import Ledger
from selfimprove.mathematics import MathGrader, final_answer
from selfimprove.testing import GraderContract

GRADER = MathGrader()


class TestMathContract(GraderContract):
    def make_plugin(self) -> Grader:
        return GRADER


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} or rather \boxed{ {2} }", "{2}"),
        (r"\boxed{3} and \boxed{unclosed", "3"),
        ("3 + 4 = 12, wait. The answer is 3 + 4 = 7 apples.", "7"),
        ("She has 5 = 2 + 3 left.\n#### 1,234", "1,234"),
        ("Answer: x = 5", "5"),
        ("**Answer:** 12", "12"),
        ("Final answer: **72**.\n", "72"),
        ("Answer: (3, 4)", "(3, 4)"),
        ("Answer: sqrt(2)", "sqrt(2)"),
        ("Answer: Tuesday", "Tuesday"),
        ("<think>9</think><answer> 7 </answer> 8", "7"),
        ("Answer: 1\nno, answer: 2\nI hope so 3", "2"),
        ("3 * 4 = 12.", "12"),
        ("it is $x=5$, I think", "5"),
        (r"which is \(\sqrt{2}\).", r"\sqrt{2}"),
        (r"we get -\frac{3}{4}", r"-\frac{3}{4}"),
        ("10-3", "3"),
        ("minus: -3", "-3"),
        ("about 2.50 dollars.", "2.50"),
        ("no idea", None),
        ("x2 and y3", None),
        ("", None),
        ("\\boxed{" * 50, None),
        ("answer: " + "9" * 1000, None),
    ],
)
def test_where_the_answer_stands(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("gold", "text", "right"),
    [
        ("12", "3 * 4 = 12", 1),
        ("12", "12.0", 1),
        ("12", "-12", 0),
        ("-3", "−3", 1),
        ("1/2", "0.5", 1),
        (r"\frac{1}{2}", r"\boxed{\dfrac{2}{4}}", 1),
        ("1,000", "Answer: 1000", 1),
        ("1/3", "0.333333", 1),
        ("1/3", "0.33", 0),
        (r"2\sqrt{2}", r"\boxed{\sqrt{8}}", 1),
        ("x^2+2x+1", "answer: $(x+1)^2$", 1),
        ("(3,4)", "answer: (4,3)", 0),
        (r"\text{Tuesday}", "The answer is: tuesday", 1),
        ("Tuesday", "tuesday", 1),
        ("5", "1/0", 0),
    ],
)
def test_right_however_it_is_written(gold: str, text: str, right: float) -> None:
    assert GRADER.grade([Answer("?", (gold,), text)], Ledger()) == [right]


HOSTILE = [
    "9**9**9**9",
    "10^{10^{10}}",
    "((((1+1)^99)^99)^99)^99",
    "99999999!",
    r"\sqrt{2}^{1000000}",
    r"\int_0^1 \sin(x^x) dx",
    "(" * 3000,
    r"\frac{" * 100 + "1" + "}" * 100,
    "$" * 7999,
    "1," * 4000,
    "\\boxed{\ud800}",
    "answer: \x00\x01",
    "answer: __import__('os').system('true')",
    "1/0",
    "0/0",
    "answer: 1e999999999",
    "−" * 500,
]


def test_hostile_answers_are_no_answers_and_take_no_time() -> None:
    begun = time.process_time()
    assert GRADER.grade([Answer("?", ("4",), t) for t in HOSTILE], Ledger()) == [0.0] * len(HOSTILE)
    assert len(GRADER.classes(HOSTILE)) == len(HOSTILE)
    assert time.process_time() - begun < 5, "the work is the helper's, and bounded"


@given(st.text(max_size=200) | st.text(alphabet="0123456789+-*/^=$\\{}().,boxed frac", max_size=60))
def test_any_text_has_one_answer_or_none(text: str) -> None:
    answer = final_answer(text)
    assert answer is None or (answer and len(answer) <= 400)


# ---- classes -------------------------------------------------------------------------------------------


def spellings(value: Fraction) -> list[str]:
    """Ways of writing a number."""
    n, d = value.numerator, value.denominator
    found = [f"{n}/{d}", rf"\boxed{{\frac{{{n}}}{{{d}}}}}", f"Answer: {2 * n}/{2 * d}", f"so it is ${n}/{d}$."]
    return [*found, str(n), f"we get {n}.0", f"#### {n:,}"] if d == 1 else found


numbers = st.fractions(-2000, 2000, max_denominator=12)
votes = st.lists(numbers, max_size=6).flatmap(lambda values: st.tuples(*(st.sampled_from(spellings(v)).map(lambda t, v=v: (v, t)) for v in values)))


@given(votes)
def test_numbers_are_equal_where_their_values_are(pairs: tuple[tuple[Fraction, str], ...]) -> None:
    classes = GRADER.classes([t for _, t in pairs])
    assert None not in classes
    for (one, _), a in zip(pairs, classes, strict=True):
        for (other, _), b in zip(pairs, classes, strict=True):
            assert (one == other) == (a == b)


@given(st.lists(st.sampled_from(["1/2", "0.5", "2", "", "nothing", "#### 2.0", "Answer: x", "answer: y"]), max_size=8), st.randoms())
def test_classes_do_not_depend_on_the_order(texts: list[str], chance: object) -> None:
    order = list(range(len(texts)))
    chance.shuffle(order)  # type: ignore[attr-defined]
    for grader in (GRADER, Exact()):
        classes = grader.classes(texts)
        assert grader.classes([texts[i] for i in order]) == [classes[i] for i in order]
        assert grader.classes(texts + texts) == classes + classes


def test_a_chain_of_near_answers_is_not_one_class() -> None:
    """50 % is 50 and .5 for math-verify; they are not equal to one another."""
    a, b, _ = GRADER.classes(["answer: 50", "answer: 0.5", "answer: 50%"])
    assert a != b


def test_who_can_tell_equal_answers() -> None:
    assert isinstance(GRADER, Equating)
    assert equating(Exact()).classes(["The cat", "cat!", " ", "dog"]) == [0, 0, None, 1]
    with pytest.raises(ConfigError, match=r"grader contains cannot tell.*choose grader=math"):
        equating(Contains())


# ---- the helper ----------------------------------------------------------------------------------------


def test_a_job_that_never_ends_is_ended_and_the_next_one_answered() -> None:
    helper = Confined("selfimprove.math_helper", 1)
    assert helper.ask(["x", "y"]) is False
    assert helper.ask(["1", "9**9**9"]) in (None, False)  # past the grader's own check
    assert helper.ask([r"\frac{x}{2}", "x/2"]) is True


def test_threads_share_a_helper_and_no_alarm_is_left() -> None:
    before = signal.getsignal(signal.SIGALRM)
    grader, found = MathGrader(), {}

    def work(i: int) -> None:
        found[i] = [grader.equal(f"{i}x+{i}", f"{i}(x+1)"), grader.equal(f"{i}x", f"{i + 1}x")]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2, 6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == {i: [True, False] for i in range(2, 6)}
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_helper_that_does_not_start_says_how_to_see_why() -> None:
    with pytest.raises(ConfigError, match=r"python -m selfimprove\.nowhere"):
        Confined("selfimprove.nowhere", 1).ask(1)


def test_settings() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        MathGrader(seconds=0)
    assert pickle.loads(pickle.dumps(MathGrader(seconds=3))).seconds == 3  # noqa: S301  a session is made in another process in tests of kills
