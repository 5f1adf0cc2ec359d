"""Generated questions of any family of `reasoning-gym` (Stojanovski et al. 2025, arXiv 2505.24760), at several levels of difficulty.

No question is in two splits: a digest of its text decides which split it belongs to, so that a split is made without looking at another one.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from selfimprove import identity
from selfimprove.answers import final_line
from selfimprove.confined import Confined
from selfimprove.discovery import nearest
from selfimprove.errors import ConfigError
from selfimprove.graders import Answer, numbered
from selfimprove.ledger import Ledger
from selfimprove.task import SPLITS, Item, Question, Split

VERSION = 1
"""Raised whenever the same parameters give other questions."""
SHARES: dict[Split, int] = {"train": 3, "validation": 1, "test": 2}
"""How many of six different questions of a family may be of each split."""
RIGHT = 0.99
"""Scores below are partial credit: reasoning-gym gives some to an answer that merely contains the right one."""
REGION = 1 << 29
"""Item i is drawn with the seed ``seed + i``, so the seeds of two splits lie in regions of their own."""
CHUNK = 500
"""Items of one dataset of reasoning-gym; some families make all of them when they are opened."""
FRUITLESS = 3_000
"""Items in a row that are no new question of a split, after which there are none."""


@dataclass(frozen=True)
class Source:
    """Where a question comes from: enough to make it again in another process."""

    family: str
    options: Mapping[str, Any]
    seed: int
    index: int


@dataclass(frozen=True)
class Made:
    """A generated question."""

    question: str
    answer: str
    level: int
    source: Source


class ReasoningGym:
    """Questions of one family without context, one per item, with the family's own answer.

    Item `i` of a split is the same however many are asked for, until a level has no more. Levels take turns, so every split has as many of each.

    Args:
        family: the name of a dataset of reasoning-gym.
        levels: the options of the family that make each level, the easiest first; a number stands for that level of the family's own
            curriculum.
        options: further options of the family, for all levels.
        train, validation, test: how many questions each split has.
        seed: other questions, unless the family has too few.
        transductive: train on the sealed questions, without their answers; every result then says so.
    """

    name = "reasoning"

    def __init__(
        self,
        family: str,
        levels: Sequence[int | Mapping[str, Any]] = (0,),
        options: Mapping[str, Any] | None = None,
        train: int = 64,
        validation: int = 20,
        test: int = 48,
        seed: int = 0,
        transductive: bool = False,
    ) -> None:
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ConfigError(
                "task=arithmetic and task=reasoning need the package reasoning-gym, which is not installed; "
                "install it with `pip install 'selfimprove[reasoning]'`"
            )
        from reasoning_gym.factory import DATASETS  # an extra, and slow to import

        if family not in DATASETS:
            raise ConfigError(f"task.family={family} is no family of reasoning-gym{nearest(family, DATASETS)} (it has {len(DATASETS)}, such as gcd)")
        self.sizes: dict[Split, int] = {"train": train, "validation": validation, "test": test}
        for split, size in self.sizes.items():
            if size < 0:
                raise ConfigError(f"task.{split}={size} is no number of questions; give 0 or more")
        if not levels:
            raise ConfigError("task.levels is empty; give at least one level, such as task.levels=[0]")
        self.family, self.seed, self.transductive = family, seed, transductive
        self.levels = [{**level_options(family, level), **(options or {})} for level in levels]
        for number, level in enumerate(self.levels):
            _dataset(family, level, 0, f"task.levels[{number}]")
        self._splits: dict[Split, tuple[Made, ...]] = {}
        self._by_text: dict[str, Made] = {}

    def items(self, split: Split) -> Sequence[Item]:
        return tuple(
            Item(f"{split}-{i:04d}", "", "", (Question(f"{split}-{i:04d}/0", made.question),), made.level) for i, made in enumerate(self.made(split))
        )

    def answers(self, split: Split) -> Mapping[str, tuple[str, ...]]:
        return {f"{split}-{i:04d}/0": (made.answer,) for i, made in enumerate(self.made(split))}

    def fingerprint(self, split: Split) -> str:
        package = importlib.metadata.version("reasoning-gym")
        return identity.digest(self.name, VERSION, package, split, self.sizes[split], self.family, self.levels, self.seed)

    def made(self, split: Split) -> tuple[Made, ...]:
        """The questions of a split, generated when first asked for."""
        if split not in self._splits:
            try:
                self._splits[split] = self._drawn(split, in_turn=True)
            except ConfigError:  # a harder level may have drawn what only an easier one is in want of: let that one draw first
                self._splits[split] = self._drawn(split, in_turn=False)
            self._by_text.update({made.question: made for made in self._splits[split]})
        return self._splits[split]

    def _drawn(self, split: Split, in_turn: bool) -> tuple[Made, ...]:
        """The questions of a split, for which levels draw in turn, or each all of its own. Raises: ConfigError, where one has too few."""
        seen: set[str] = set()
        size, count = self.sizes[split], len(self.levels)
        levels = [self._level(split, number, seen) for number in range(count)]
        if not in_turn:
            levels = [iter([next(level) for _ in range(number, size, count)]) for number, level in enumerate(levels)]
        return tuple(next(levels[i % count]) for i in range(size))

    def origin(self, question: str) -> Made | None:
        """Where a question comes from; None where it is not of this task. The sealed split is looked at last."""
        for split in SPLITS:
            if question in self._by_text:
                break
            self.made(split)
        return self._by_text.get(question)

    def _level(self, split: Split, level: int, seen: set[str]) -> Iterator[Made]:
        """The questions of a level that belong to a split and were not `seen`. Raises: ConfigError, when there are no more."""
        start = SPLITS.index(split) * REGION + identity.seed_for(self.seed, "reasoning", self.family, split, level) % (REGION // 2)
        found, fruitless, unscored = 0, 0, 0
        for number in range(REGION // 2):
            index = number % CHUNK
            if index == 0:
                dataset = _dataset(self.family, self.levels[level], start + number, f"task.levels[{level}]")
            if fruitless >= FRUITLESS:
                break
            entry = dataset[index]
            question, answer = entry["question"].strip(), entry["answer"]
            fruitless += 1
            if question in seen or _home(question) != split:
                continue
            if not isinstance(answer, str) or not answer.strip() or dataset.score_answer(answer, entry) < RIGHT:
                unscored += 1
                continue
            seen.add(question)
            found, fruitless = found + 1, 0
            yield Made(question, answer.strip(), level, Source(self.family, self.levels[level], start + number - index, index))
        if unscored > found:
            raise ConfigError(f"task.family={self.family}: its scorer does not accept the answers that it gives itself; choose another family")
        raise ConfigError(
            f"task.family={self.family} has only {found} different questions for {split} at level {level}; "
            f"lower task.{split}, or choose harder levels"
        )


class OwnScore:
    """1 where the family's own scoring function accepts the text's final answer fully, in a process of its own.

    The final answer is what stands in the last ``\\boxed{}``, in ``<answer>`` tags, after the last "answer:", "answer is" or "####", or else the
    last line. For a vote, answers are equal where they read the same.

    Args:
        task: the task whose questions are graded.
        seconds: processor seconds that one answer may take; one that takes longer is wrong.
    """

    name = "reasoning"

    def __init__(self, task: ReasoningGym, seconds: int = 5) -> None:
        if not isinstance(task, ReasoningGym):
            raise ConfigError(
                f"grader=reasoning grades task=arithmetic and task=reasoning; got {type(task).__name__}. Choose grader=math or contains"
            )
        if seconds < 1:
            raise ConfigError(f"grader.seconds={seconds} is too short; give at least 1")
        self.task, self.seconds = task, seconds

    def grade(self, answers: Sequence[Answer], ledger: Ledger) -> list[float]:
        return [float(self._score(a) >= RIGHT) for a in answers]

    def classes(self, texts: Sequence[str]) -> list[int | None]:
        answers = [final_line(t) for t in texts]
        return numbered([None if a is None else " ".join(a.casefold().split()) for a in answers])

    def _score(self, answer: Answer) -> float:
        made, text = self.task.origin(answer.question), final_line(answer.text)
        if made is None:
            raise ConfigError(f"grader=reasoning was asked about {answer.question[:80]!r}, which is no question of its task; choose another grader")
        if text is None:
            return 0.0
        if text == made.answer:
            return 1.0
        where = made.source
        score = self._helper.ask([where.family, where.options, where.seed, where.index, made.question, text])
        if score == "differs":
            raise ConfigError(f"task.family={where.family} does not make the same question twice, so no run could be repeated; choose another family")
        return float(score or 0.0)

    @cached_property
    def _helper(self) -> Confined:
        return Confined("selfimprove.tasks.reasoning_helper", self.seconds)


def level_options(family: str, level: int | Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of a level: as they are given, or those of the family's own curriculum, which ends at its highest level."""
    if isinstance(level, Mapping):
        return level
    from reasoning_gym.factory import create_curriculum, has_curriculum

    if level == 0 and not has_curriculum(family):
        return {}
    if level < 0 or not has_curriculum(family):
        raise ConfigError(
            f"task.levels has {level}, but {family} has no such level; describe levels by the family's options, such as {{min_digits: 2}}"
        )
    curriculum = create_curriculum(family)
    curriculum.set_global_level(level)
    config = curriculum.generate_configuration()
    kinds = ("field_name", "lower_field_name", "upper_field_name")
    return {vars(d)[kind]: getattr(config, vars(d)[kind]) for d in curriculum.attributes.values() for kind in kinds if kind in vars(d)}


def _dataset(family: str, options: Mapping[str, Any], seed: int, where: str) -> Any:
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(family, **{**options, "seed": seed, "size": CHUNK})
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"{where}: reasoning-gym's {family} does not take {dict(options)}: {error}") from error


def _home(question: str) -> Split:
    """The split that a question belongs to."""
    place = identity.seed_for(0, "reasoning split", question) % sum(SHARES.values())
    for split, share in SHARES.items():
        place -= share
        if place < 0:
            return split
    raise AssertionError(question)
