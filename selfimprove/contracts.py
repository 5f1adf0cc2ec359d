"""The contracts between roles, as the outermost wrappers of every hook.

They run around all plugins and all middleware: what a role returns is checked once, and the message names
what was wanted, what came and what to do. They also tell observers which stage begins.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import Any

from selfimprove.errors import ContractError
from selfimprove.hooks import hookimpl
from selfimprove.records import Candidate, Edit, Evaluation, Lineage, Trial
from selfimprove.run import Run


class Contracts:
    """Registered last and marked `tryfirst`, so outside every other wrapper, whatever its own marks."""

    @hookimpl(wrapper=True, tryfirst=True)
    def prepare(self, run: Run) -> Generator[None, Any, Any]:
        with run.stage("prepare", 1):
            result = yield
        _expect(result, Candidate, "prepare", "the candidate to start from")
        return result

    @hookimpl(wrapper=True, tryfirst=True)
    def select(self, lineage: Lineage, run: Run) -> Generator[None, Any, Any]:
        with run.stage("select", 1):
            parents = _sequence((yield), Candidate, "select", "candidates")
        if not parents:
            raise ContractError("select returned no parents; return at least one member of the lineage")
        for parent in parents:
            if parent.id not in lineage:
                raise ContractError(f"select returned candidate {parent.id}, which is not in the lineage; return members of it")
        return parents

    @hookimpl(wrapper=True, tryfirst=True)
    def propose(self, parents: Sequence[Candidate], lineage: Lineage, run: Run) -> Generator[None, Any, Any]:
        with run.stage("propose", len(parents)):
            edits = _sequence((yield), Edit, "propose", "edits")
        for i, edit in enumerate(edits):
            for parent in edit.parents:
                if parent not in lineage:
                    raise ContractError(f"edit {i} names parent {parent}, which is not in the lineage; use the ids of its members")
        return edits

    @hookimpl(wrapper=True, tryfirst=True)
    def apply(self, edits: Sequence[Edit], run: Run) -> Generator[None, Any, Any]:
        with run.stage("apply", len(edits)):
            trials = _sequence((yield), Trial, "apply", "trials")
        order = {id(e): i for i, e in enumerate(edits)}
        last = -1
        for i, trial in enumerate(trials):
            place = order.get(id(trial.edit))
            if place is None:
                raise ContractError(f"trial {i} is of an edit that was not proposed; return trials of the edits you were given")
            if place < last:
                raise ContractError(f"trial {i} is of edit {place}, after one of edit {last}; return trials in the order of the edits")
            last = place
        if missing := set(order.values()) - {order[id(t.edit)] for t in trials}:
            raise ContractError(
                f"apply returned no trial for edit {min(missing)} of {len(edits)}; return at least one each, and let reward "
                "give score=None to one that cannot work"
            )
        return trials

    @hookimpl(wrapper=True, tryfirst=True)
    def reward(self, trials: Sequence[Trial], run: Run) -> Generator[None, Any, Any]:
        with run.stage("reward", len(trials)):
            rewards = _sequence((yield), Evaluation, "reward", "evaluations")
            run.ledger.charge(evaluations=sum(r.score is not None for r in rewards))
        if len(rewards) != len(trials):
            raise ContractError(
                f"reward returned {len(rewards)} evaluations for {len(trials)} trials; "
                "return one per trial, in order, with score=None for those you cannot measure"
            )
        return rewards

    @hookimpl(wrapper=True, tryfirst=True)
    def update(self, lineage: Lineage, run: Run) -> Generator[None, Any, Any]:
        with run.stage("update", 1):
            children = _sequence((yield), Candidate, "update", "candidates")
        seen: set[str] = set()
        for child in children:
            if child.id in lineage or child.id in seen:
                raise ContractError(f"update returned candidate {child.id} again; derive children with a salt that is new")
            if not child.parents or any(p not in lineage for p in child.parents):
                raise ContractError(f"child {child.id} has parents {child.parents}; a child needs parents from the lineage")
            seen.add(child.id)
        return children

    @hookimpl(wrapper=True, tryfirst=True)
    def evaluate(self, candidates: Sequence[Candidate], lineage: Lineage, run: Run) -> Generator[None, Any, Any]:
        with run.stage("evaluate", len(candidates)):
            scores = yield
        if not isinstance(scores, Sequence):
            raise ContractError(f"evaluate returned {type(scores).__name__}; return a list of (candidate id, Evaluation)")
        known = {c.id for c in candidates}
        for pair in scores:
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Evaluation)):
                raise ContractError(f"evaluate returned {pair!r}; return pairs (candidate id, Evaluation)")
            if pair[0] not in known and pair[0] not in lineage:
                raise ContractError(f"evaluate scored {pair[0]!r}, which is neither a new candidate nor in the lineage")
        return scores


def _expect(value: Any, kind: type, hook: str, what: str) -> None:
    if not isinstance(value, kind):
        raise ContractError(f"{hook} returned {type(value).__name__}; return {what} ({kind.__name__})")


def _sequence(value: Any, kind: type, hook: str, what: str) -> Sequence[Any]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise ContractError(f"{hook} returned {type(value).__name__}; return a list of {what} ({kind.__name__})")
    items = list(value)
    for i, item in enumerate(items):
        if not isinstance(item, kind):
            raise ContractError(f"{hook} returned {type(item).__name__} at position {i}; return a list of {what} ({kind.__name__})")
    return items
