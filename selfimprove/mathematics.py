"""The grader of mathematics: an answer is right where it is equal to an accepted one, however it is written."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cached_property

from selfimprove.answers import cleaned, stated
from selfimprove.confined import Confined
from selfimprove.errors import ConfigError
from selfimprove.graders import Answer
from selfimprove.ledger import Ledger

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+|\d{1,80})(?:\.\d{0,80})?|\.\d{1,80}"
_NUMBER = rf"[-+−]? ?(?:{_UNSIGNED})"
_PLAIN = re.compile(rf"\s*({_NUMBER})(?:\s*/\s*({_NUMBER}))?\s*")
_FRACTION = re.compile(rf"\s*([-+−]?)\s*\\[dt]?frac\s*\{{\s*({_NUMBER})\s*\}}\s*\{{\s*({_NUMBER})\s*\}}\s*")
_MENTIONED = re.compile(
    r"\$(?P<dollar>[^$\n]{1,400})\$|\\\((?P<round>[^\n]{1,400}?)\\\)|\\\[(?P<square>[^\n]{1,400}?)\\\]"
    r"|(?P<fraction>[-+−]?\\[dt]?frac\{[^{}\n]{1,80}\}\{[^{}\n]{1,80}\})"
    rf"|(?P<number>(?<![\w.])[-+−]?(?:{_UNSIGNED})(?:/(?:{_UNSIGNED}))?(?![\w]))"
)
_WORDS = re.compile(r"(?<![\\A-Za-z])(?!sqrt|pi\b|sin|cos|tan|log|ln|exp)[A-Za-z]{2,}")
_HEAVY = re.compile(r"[!^]\s*[!^]|\d{4,}\s*!|(?:\^|\*\*)\s*[({]*\s*-?\d{4,}|(?:\^|\*\*)\s*\{?[^{}+\-=]{0,40}(?:\^|\*\*)|\d{81,}")
"""Towers of powers, large factorials and large exponents: what would take forever to evaluate is nobody's answer."""
_NEAR = Fraction(1, 10**5)
"""Numbers farther apart are not equal for math-verify either, which rounds to six decimals."""
REMEMBERED = 200_000


class MathGrader:
    """1 where the text's final answer is equal to an accepted one, as math-verify judges.

    The final answer is what stands in the last ``\\boxed{}``, in ``<answer>`` tags, after the last "answer:", "answer is" or "####", or else
    the last number or formula of the text. Numbers are compared exactly and in this process; everything else by math-verify in a
    helper process, so that no text hangs or breaks the run.

    Args:
        seconds: processor seconds that one comparison may take; one that takes longer is not equal.
    """

    name = "math"

    def __init__(self, seconds: int = 5) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError("grader=math needs the package math-verify, which is not installed; install it with `pip install 'selfimprove[math]'`")
        if seconds < 1:
            raise ConfigError(f"grader.seconds={seconds} is too short; give at least 1")
        self.seconds = seconds
        self._known: dict[tuple[str, str], bool] = {}

    def grade(self, answers: Sequence[Answer], ledger: Ledger) -> list[float]:
        return [float(any(self._right(gold, a.text) for gold in a.gold)) for a in answers]

    def classes(self, texts: Sequence[str]) -> list[int | None]:
        """For each text the number of its class of equal answers; None for a text without an answer.

        Which texts are equal does not depend on their order or number: each distinct answer joins the first class whose shortest
        member it is equal to.
        """
        answers = [final_answer(t) for t in texts]
        distinct = sorted({a for a in answers if a is not None}, key=lambda a: (_exact(a) is None, len(a), a))
        firsts: list[str] = []
        found: dict[str, int] = {}
        for answer in distinct:
            found[answer] = next((i for i, first in enumerate(firsts) if self.equal(first, answer)), len(firsts))
            if found[answer] == len(firsts):
                firsts.append(answer)
        return [None if a is None else found[a] for a in answers]

    def equal(self, gold: str, answer: str) -> bool:
        """Whether an answer is equal to one that is taken for right. Both are bare answers."""
        if _spelling(gold) == _spelling(answer):
            return True
        one, other = _exact(gold), _exact(answer)
        if one is not None and other is not None and (one == other or abs(one - other) > _NEAR):
            return one == other
        if _HEAVY.search(gold) or _HEAVY.search(answer):
            return False
        pair = (gold, answer)
        if pair not in self._known:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[pair] = self._helper.ask(pair) is True
        return self._known[pair]

    def _right(self, gold: str, text: str) -> bool:
        bare = cleaned(gold) or gold
        answer = final_answer(text)
        return _spelling(text) == _spelling(bare) if answer is None else self.equal(bare, answer)

    @cached_property
    def _helper(self) -> Confined:
        return Confined("selfimprove.math_helper", self.seconds)


def final_answer(text: str) -> str | None:
    """The final answer of a text, bare; None where it holds none.

    Of a sentence that it marks as its answer ("the answer is 3 + 4 = 7 apples"), the last number or formula; what is marked without words
    around it is taken whole.
    """
    marked = stated(text)
    if marked is None:
        return next(_mentioned(text), None)
    if _WORDS.search(marked) and (found := next(_mentioned(marked), None)):
        return found
    return _value(marked)


def _mentioned(text: str) -> Iterator[str]:
    """The numbers and formulas of a text, the last one first."""
    for match in reversed(list(_MENTIONED.finditer(text[-8_000:]))):
        if found := cleaned(next(g for g in match.groups() if g is not None)):
            yield _value(found)


def _value(answer: str) -> str:
    """What is right of the last equals sign, where that is a plain number; else the whole answer."""
    tail = answer.rpartition("=")[2].strip()
    return tail if _exact(tail) is not None else answer


def _exact(text: str) -> Fraction | None:
    """The number that a plain decimal or fraction stands for; None for everything else."""
    if match := _PLAIN.fullmatch(text):
        sign, above, below = 1, match[1], match[2] or "1"
    elif match := _FRACTION.fullmatch(text):
        sign, above, below = -1 if match[1] in ("-", "−") else 1, match[2], match[3]
    else:
        return None
    denominator = _fraction(below)
    return sign * _fraction(above) / denominator if denominator else None


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace("−", "-").replace(",", "").replace(" ", ""))


def _spelling(text: str) -> str:
    """A text without what carries no meaning in mathematics: blanks, dollars, case of words, `\\text{}`."""
    bare = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    return re.sub(r"[\s$]+|\\[,;! ]|\\left|\\right", "", bare).casefold()
