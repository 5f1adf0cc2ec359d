"""What a run really did, seen from outside of it: the work of its engine, the answers that were read, the files that were opened."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from selfimprove.errors import SealedError
from selfimprove.identity import digest
from selfimprove.task import Task


class MeteredEngine:
    """An engine, and beside it what its work cost: `spent`, by unit.

    Equal tiles count once, as a run remembers them and as weights that were pruned are made again without a charge.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._costs: dict[str, Mapping[str, float]] = {}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._engine, name)
        return self._metered(name, found) if name in ("generate", "score", "train", "reinforce", "prefer") else found

    @property
    def spent(self) -> dict[str, float]:
        return {unit: sum(c.get(unit, 0) for c in self._costs.values()) for unit in sorted({u for c in self._costs.values() for u in c})}

    def _metered(self, call: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        def measured(tile: Sequence[Any], weights: Any) -> Any:
            results, costs = compute(tile, weights)
            if call == "generate":  # counted, not believed
                costs = {**costs, "generated_tokens": max(costs.get("generated_tokens", 0), sum(c.tokens for c in results))}
            self._costs[digest(call, [dataclasses.asdict(r) for r in tile])] = costs
            return results, costs

        return measured


class _Watched(dict[str, tuple[str, ...]]):
    """Answers that note which of them were read."""

    def __init__(self, answers: Mapping[str, tuple[str, ...]], read: set[str]) -> None:
        super().__init__(answers)
        self._read = read

    def __getitem__(self, key: str) -> tuple[str, ...]:
        self._read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401

    def values(self) -> Any:
        self._read.update(self)
        return super().values()

    def items(self) -> Any:
        self._read.update(self)
        return super().items()


@contextlib.contextmanager
def sealed(task: Task, files: Sequence[Path] = ()) -> Iterator[set[str]]:
    """The ids of the answers that are read while inside; opening the test split, by whatever object of the task's class, raises.

    Args:
        task: of the run.
        files: which nobody may open while inside, where the test split has files of its own.

    Raises: SealedError, at the instant somebody opens the test split or one of the files.
    """
    cls, read = type(task), set[str]()
    items, answers = cls.items, cls.answers

    def watched_items(self: Any, split: Any) -> Any:
        _refuse_test(split)
        return items(self, split)

    def watched_answers(self: Any, split: Any) -> Any:
        _refuse_test(split)
        return _Watched(answers(self, split), read)

    forbidden = {os.path.realpath(f) for f in files}
    _watch_files()
    _FORBIDDEN.update(forbidden)
    cls.items, cls.answers = watched_items, watched_answers  # type: ignore[method-assign]
    try:
        yield read
    finally:
        cls.items, cls.answers = items, answers  # type: ignore[method-assign]
        _FORBIDDEN.difference_update(forbidden)


def _refuse_test(split: str) -> None:
    if split == "test":
        raise SealedError("the test split was opened during a run; leave it to `selfimprove eval`")


_FORBIDDEN: set[str] = set()
_WATCHING: list[bool] = []


def _watch_files() -> None:
    """Python's audit hooks stay for the life of a process, so there is one."""
    if not _WATCHING:
        _WATCHING.append(True)
        sys.addaudithook(_on_event)


def _on_event(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _FORBIDDEN and isinstance(arguments[0], str | bytes | os.PathLike):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if path in _FORBIDDEN:
            raise SealedError(f"{path} holds the test split and was opened during a run; leave it to `selfimprove eval`")


def unsafe_files(folder: Path) -> list[str]:
    """What lies in a run folder and is neither safetensors nor JSON nor text: (name: why) for each such file."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        reason = _unsafe(path)
        if reason:
            found.append(f"{path.relative_to(folder)}: {reason}")
    return found


def _unsafe(path: Path) -> str | None:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np"):
                return None
        text = path.read_bytes().decode(errors="strict")
        if path.suffix == ".json":
            json.loads(text)
        elif path.suffix == ".jsonl":
            for line in text.splitlines():
                json.loads(line)
    except (SafetensorError, UnicodeDecodeError, ValueError) as e:
        return f"it is no {path.suffix.lstrip('.') or 'text'} file ({e}); write JSON, text or safetensors"
    return "it holds control characters; write JSON, text or safetensors" if "\x00" in text else None
