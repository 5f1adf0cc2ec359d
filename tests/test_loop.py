from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

from selfimprove import hooks, loop
from selfimprove.hooks import hookimpl
from selfimprove.records import Evaluation, Trial
from selfimprove.testing import NoopEditor, noop_roles, toy_session

BOX = """
    P = select(L)        parents, drawn from everything made so far
    E = propose(P)       edits the parents would make to themselves
    T = apply(E)         the candidate each edit would make ("trial")
    R = reward(T)        what the strategy optimises
    C = update(T, R)     the candidates it makes of that
    S = evaluate(C)      what we believe candidates are worth
    L = L + (P, T, R, C, S)
"""


def test_the_loop_is_the_box_and_stays_small() -> None:
    function = ast.parse(inspect.getsource(loop)).body[-1]
    assert isinstance(function, ast.FunctionDef)
    body = function.body[1:]  # without the docstring
    assert sum(len(ast.unparse(statement).splitlines()) for statement in body) <= 15
    assert not any(isinstance(node, ast.If) for node in ast.walk(function)), "a strategy that needs an `if` here is a missing hook"
    assert BOX in (loop.improve.__doc__ or "")
    assert BOX in (hooks.__doc__ or "")


def test_stages_come_in_the_order_of_the_box(tmp_path: Path) -> None:
    order: list[str] = []

    class Listens:
        @hookimpl
        def progress(self, stage: str, done: int) -> None:
            if done == 0:
                order.append(stage)

    toy_session(tmp_path, rounds=2, observers=[Listens()], **noop_roles()).improve()
    assert order == ["prepare", *["select", "propose", "apply", "reward", "update", "evaluate"] * 2]


def test_the_defaults_are_identities(tmp_path: Path) -> None:
    """Without an `apply` an edit is its own trial; without an updater a measurable trial is its own child."""

    class Measures:
        @hookimpl
        def reward(self, trials: Any) -> Any:
            return [Evaluation.failed("odd") if i % 2 else Evaluation(1.0) for i in range(len(trials))]

    lineage = toy_session(tmp_path, rounds=1, **noop_roles(edits=4, rewarder=Measures())).improve()
    r = lineage.round(0)
    assert [t.edit.parents for t in r.trials] == [(lineage.root.id,)] * 4
    assert [c.id for c in r.children] == [t.candidate.id for t in r.trials[::2]]
    assert r.scores == ()


def test_replicates_stand_behind_their_edit(tmp_path: Path) -> None:
    class Twice(NoopEditor):
        @hookimpl
        def apply(self, edits: Any, lineage: Any) -> Any:
            return [Trial(e, lineage.latest.derive(len(lineage), i, k), k) for i, e in enumerate(edits) for k in range(2)]

    lineage = toy_session(tmp_path, rounds=1, **noop_roles(editor=Twice())).improve()
    assert [t.replicate for t in lineage.round(0).trials] == [0, 1] * 3
