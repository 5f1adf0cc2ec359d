"""What a run offers to its plugins."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from selfimprove import identity
from selfimprove.blobs import Blobs
from selfimprove.ledger import Ledger

if TYPE_CHECKING:
    from selfimprove.graders import Grader
    from selfimprove.models import Models
    from selfimprove.sandbox import Sandboxes
    from selfimprove.task import TaskView

T = TypeVar("T")


@dataclass
class Run:
    """The services of one run. Plugins read them and never replace them."""

    folder: Path
    seed: int
    task: TaskView
    """Unlabelled items and, for plugins that declare it, labels."""
    models: Models
    """Generate, score, train and open: always in batches, memoised on disk, charged."""
    grader: Grader
    """Whether an answer is right."""
    ledger: Ledger
    sandbox: Sandboxes
    """Runs code that nobody has read; refuses to, where the run has no sandbox."""
    roles: Mapping[str, Any] = field(default_factory=dict)
    """The plugin that fills each role, for a role that needs another."""
    notify: Callable[[str, int, int], None] = lambda stage, done, total: None
    """Tells the observers' `progress`; set when the plugins are admitted."""
    closing: list[Callable[[], None]] = field(default_factory=list)
    """What to release at teardown."""

    _stage: str = "start"
    _total: int = 0
    _done: int = 0

    @property
    def blobs(self) -> Blobs:
        """Small content of parts: votes, prompts, code."""
        return Blobs(self.folder)

    def rng(self, *name: str | int) -> np.random.Generator:
        """The random stream called `name`, from its start: the same after a resume."""
        return identity.rng(self.seed, *name)

    def seed_for(self, *name: str | int) -> int:
        """An integer seed from the stream called `name`."""
        return identity.seed_for(self.seed, *name)

    def in_turn(self, name: str, pool: Sequence[T], count: int, number: int) -> list[T]:
        """What round `number` takes of a pool: the next `count` of one shuffled order, which the stream called `name` draws; 0 takes all of it."""
        order = self.rng(name).permutation(len(pool)).tolist()
        count = min(count or len(order), len(order))
        return [pool[order[(number * count + n) % len(order)]] for n in range(count)]

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[None]:
        """A stage of a round: charges are booked under its name, labels are read in the name of its role's plugin."""
        self.ledger.tick()
        before = (self._stage, self._total, self._done, self.ledger.stage)
        self._stage, self._total, self._done, self.ledger.stage = name, total, 0, name
        plugins = [self.roles.get(ROLE_OF_STAGE[name])] if name in ROLE_OF_STAGE else [p for p in self.roles.values() if hasattr(p, name)]
        declared = any(getattr(p, "uses_labels", False) for p in plugins)
        self.notify(name, 0, total)
        try:
            with self.task.reading_as(f"{', '.join(type(p).__name__ for p in plugins)} (in {name})", declared):
                yield
        finally:
            self.ledger.tick()
            self._stage, self._total, self._done, self.ledger.stage = before

    def advance(self, done: int, total: int) -> None:
        """Tell observers that `done` of `total` pieces of the current stage's work are finished."""
        self._done, self._total = done, total
        self.notify(self._stage, done, total)

    def close(self) -> None:
        while self.closing:
            self.closing.pop()()


ROLE_OF_STAGE = {
    "select": "selector",
    "propose": "editor",
    "apply": "editor",
    "reward": "rewarder",
    "update": "updater",
    "evaluate": "evaluator",
}
