"""SEAL's roles on the toy task, and an engine that remembers what it was asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import settings

from selfimprove.models.api import Completion, Generate, Lora, Score, Train
from selfimprove.models.layer import Weights
from selfimprove.models.tiles import Adapter
from selfimprove.testing import ScriptedEngine
from selfimprove_seal import Accuracy, ClosedBook, ReSTEM, SelfEdits
from selfimprove_seal.inner import InnerLoop

os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("default", deadline=None, max_examples=60)
settings.load_profile("default")

LORA: dict[str, Any] = {"rank": 2, "alpha": 4, "targets": ["q_proj"], "learning_rate": 1.0, "epochs": 2}


def inner(**changes: Any) -> InnerLoop:
    return InnerLoop(**{"lora": LORA, "question": "Question: {question} Answer:", "answer_tokens": 8, **changes})


class Recorder(ScriptedEngine):
    """A scripted engine that keeps every request that it computed."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.generated: list[Generate] = []
        self.scored: list[Score] = []
        self.trained: list[Train] = []

    def generate(self, tile: Sequence[Generate], weights: Weights) -> tuple[list[Completion], dict[str, float]]:
        self.generated += tile
        return super().generate(tile, weights)

    def score(self, tile: Sequence[Score], weights: Weights) -> Any:
        self.scored += tile
        return super().score(tile, weights)

    def train(self, tile: Sequence[Train], weights: Weights) -> tuple[list[tuple[Adapter, int, float]], dict[str, float]]:
        self.trained += tile
        return super().train(tile, weights)


@pytest.fixture
def make_inner() -> Callable[..., InnerLoop]:
    """An inner loop with small settings: `make_inner(pairs="prompt")`."""
    return inner


@pytest.fixture
def recorder() -> Callable[..., Recorder]:
    """A scripted engine that remembers: `recorder(facts=…)`."""
    return Recorder


@pytest.fixture
def roles() -> Callable[..., dict[str, Any]]:
    """SEAL's four roles; keyword arguments replace single ones."""

    def make(**changes: Any) -> dict[str, Any]:
        return {
            "editor": SelfEdits(inner=inner(), contexts=2, edits=2, max_tokens=64),
            "rewarder": Accuracy(),
            "updater": ReSTEM(lora=Lora(1, 1, ("q_proj",), 1.0, 1, merge=True)),
            "evaluator": ClosedBook(),
            **changes,
        }

    return make
