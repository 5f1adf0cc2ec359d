"""The scripted engine as the configuration makes it: it knows the facts of a toy task of the same size and seed."""

from __future__ import annotations

from selfimprove.testing.engine import ScriptedEngine
from selfimprove.testing.toys import ToyTask


class ToyEngine(ScriptedEngine):
    """A `ScriptedEngine` for ``ToyTask(people, seed)``."""

    def __init__(self, people: int = 2, seed: int = 0) -> None:
        super().__init__(facts=ToyTask(people, seed).facts)
