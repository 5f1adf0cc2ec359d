"""What a run would cost: everything is opened, speed is measured on a few small batches, and nothing is started."""

from __future__ import annotations

import contextlib
import inspect
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

from selfimprove import config as configuration
from selfimprove.config import Config
from selfimprove.errors import ConfigError, SelfImproveError
from selfimprove.guards import Rounds
from selfimprove.hooks import ROLES
from selfimprove.ledger import UNITS, Ledger
from selfimprove.models import Document, Generate, Lora, Models, Score, Train
from selfimprove.run import Run
from selfimprove.sandbox import Sandboxes
from selfimprove.session import Parts
from selfimprove.task import TaskView

ROWS = 8
"""Requests of a measured batch."""
NEW_TOKENS = 32
SPEEDS = {"generate": "generated_tokens", "score": "scored_tokens", "train": "trained_tokens"}
"""The ledger unit that each measured call is paid in."""


def planned(config: Config) -> Iterator[str]:
    """The lines of the plan. Raises: ConfigError and AdmissionError, as a run would."""
    parts = configuration.build(config)
    with tempfile.TemporaryDirectory(prefix="selfimprove-plan-") as scratch:
        ledger = Ledger()
        models = Models(parts.engine, Path(scratch), ledger)
        run = Run(
            Path(scratch),
            parts.seed,
            TaskView(parts.task, ledger),
            models,
            parts.grader,
            ledger,
            Sandboxes(parts.sandbox, Path(scratch), ledger),
            parts.roles,
        )
        yield f"strategy {config.strategy}, seed {config.seed}"
        for role in ROLES:
            yield f"  {role:<10} {type(parts.roles[role]).__name__ if role in parts.roles else 'default'}"
        yield f"task {run.task.name}: {len(run.task.train)} train and {len(run.task.validation)} validation items open; the test stays sealed"
        model = config.values["engine"].get("model", parts.engine.name)  # an engine without this argument is its own model
        yield f"model {model}, engine {parts.engine.name}, digest {models.root.digest[:12]}"
        rates = yield from _measured(run, _lora(config.values))
        yield from _expected(parts, run, rates)
    yield "nothing was started"


def _measured(run: Run, lora: Lora) -> Generator[str, None, dict[str, float]]:
    """The measured speeds, as lines; returns tokens per second by ledger unit."""
    items = [run.task.train[i % len(run.task.train)] for i in range(ROWS)] if run.task.train else []
    if not items:
        raise ConfigError("the task has no training items; raise task.train")
    root, models = run.models.root, run.models
    texts = [item.context or " ".join(q.text for q in item.questions) for item in items]
    calls: dict[str, Callable[[int], Any]] = {
        "generate": lambda n: models.generate([Generate(root, t, NEW_TOKENS, seed=100 * n + i) for i, t in enumerate(texts)]),
        "score": lambda n: models.score([Score(root, f"{n}\n", t) for t in texts]),
        "train": lambda n: models.train([Train(root, (Document(t),), lora, seed=100 * n + i) for i, t in enumerate(texts)]),
    }
    rates: dict[str, float] = {}
    for name, call in calls.items():
        unit = SPEEDS[name]
        try:
            call(0)  # the first call of a kind allocates
            before, begun = run.ledger.totals[unit], time.perf_counter()
            call(1)
        except (SelfImproveError, ValueError, KeyError) as e:
            yield f"  {name}: not measured ({str(e).splitlines()[0]})"
            continue
        rates[unit] = (run.ledger.totals[unit] - before) / max(1e-9, time.perf_counter() - begun)
        yield f"  {name}: {rates[unit]:,.0f} tokens per second, {ROWS} at once"
    return rates


def _expected(parts: Parts, run: Run, rates: Mapping[str, float]) -> Iterator[str]:
    per_round: dict[str, float] = {}
    silent = []
    for role, plugin in parts.roles.items():
        tell = getattr(plugin, "expected", None)
        if tell is None:
            silent.append(role)
            continue
        told = dict(tell(run)) if inspect.signature(tell).parameters else dict(tell())
        if strange := sorted(set(told) - set(UNITS)):
            raise ConfigError(f"{type(plugin).__name__}.expected names {', '.join(strange)}; a ledger has {', '.join(UNITS)}")
        for unit, amount in told.items():
            per_round[unit] = per_round.get(unit, 0.0) + amount
    if not per_round:
        yield "no role of this strategy tells what a round costs (a plugin does with `expected(run) -> {unit: amount}`)"
        return
    rounds = next((g.rounds for g in parts.observers if isinstance(g, Rounds)), None)
    seconds = sum(amount / rates[unit] for unit, amount in per_round.items() if rates.get(unit))
    yield "expected for one round:"
    for unit in UNITS:
        if unit in per_round:
            yield f"  {unit:<17} {per_round[unit]:>14,.0f}"
    yield f"  {'time':<17} {_clock(seconds):>14}"
    if rounds is not None:
        yield f"expected for {rounds} rounds: {_clock(rounds * seconds)}"
    else:
        yield "how many rounds there will be is not configured (guard=[rounds] says it)"
    if "selector" in silent:
        silent.remove("selector")
    if silent:
        yield f"not counted, because they do not tell: {', '.join(silent)}"


def _lora(values: Mapping[str, Any]) -> Lora:
    """The first adapter that the configuration describes, trained for one pass, so that the speed is of its size."""
    for node in _mappings({k: values.get(k) for k in ROLES}):
        if {"rank", "alpha", "targets"} <= set(node):
            with contextlib.suppress(TypeError, ConfigError):
                return Lora(int(node["rank"]), float(node["alpha"]), tuple(node["targets"]), float(node.get("learning_rate", 1e-3)), epochs=1)
    return Lora(rank=8, alpha=16, targets=("q_proj", "v_proj"), learning_rate=1e-3, epochs=1)


def _mappings(node: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(node, Mapping):
        yield node
        for value in node.values():
            yield from _mappings(value)
    elif isinstance(node, list):
        for value in node:
            yield from _mappings(value)


def _clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
