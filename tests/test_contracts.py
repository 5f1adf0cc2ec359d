"""Each contract is broken once, and the message says what was wanted, what came and what to do."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from selfimprove.errors import ContractError, LabelError, SealedError
from selfimprove.hooks import hookimpl
from selfimprove.payloads import Text
from selfimprove.records import Candidate, Edit, Evaluation, Trial
from selfimprove.testing import NoopEditor, NoopRewarder, noop_roles, toy_session

STRANGER = Candidate("stranger", {}, ())


class Selects:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    @hookimpl
    def select(self) -> Any:
        return self.answer


class Proposes:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    @hookimpl
    def propose(self) -> Any:
        return self.answer


class Applies(NoopEditor):
    def __init__(self, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.answer = answer

    @hookimpl
    def apply(self, edits: Any, lineage: Any) -> Any:
        return self.answer(edits, lineage.root)


class Rewards:
    def __init__(self, answer: Callable[..., Any]) -> None:
        self.answer = answer

    @hookimpl
    def reward(self, trials: Any) -> Any:
        return self.answer(trials)


class Updates:
    def __init__(self, answer: Callable[..., Any]) -> None:
        self.answer = answer

    @hookimpl
    def update(self, lineage: Any) -> Any:
        return self.answer(lineage.root)


class Evaluates:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    @hookimpl
    def evaluate(self) -> Any:
        return self.answer


def _twice(edits: Any, root: Candidate) -> list[Trial]:
    return [Trial(e, root.derive(i)) for i, e in enumerate(edits)]


BROKEN = [
    ({"selector": Selects([])}, "select returned no parents; return at least one member"),
    ({"selector": Selects([STRANGER])}, "select returned candidate stranger, which is not in the lineage"),
    ({"selector": Selects(STRANGER)}, r"select returned Candidate; return a list of candidates \(Candidate\)"),
    ({"selector": Selects(["x"])}, "select returned str at position 0"),
    ({"selector": Selects("abc")}, "select returned str; return a list"),
    ({"editor": Proposes([Edit(("stranger",), Text(""))])}, "edit 0 names parent stranger, which is not in the lineage"),
    ({"editor": Proposes([Text("")])}, "propose returned Text at position 0"),
    ({"editor": Applies(lambda edits, root: _twice(edits, root)[:-1])}, "apply returned no trial for edit 2 of 3; return at least one each"),
    ({"editor": Applies(lambda edits, root: _twice(edits, root)[::-1])}, "trial 1 is of edit 1, after one of edit 2"),
    ({"editor": Applies(lambda edits, root: [Trial(Edit((root.id,), Text("")), root)])}, "trial 0 is of an edit that was not proposed"),
    ({"editor": Applies(lambda edits, root: edits)}, "apply returned Edit at position 0"),
    ({"rewarder": Rewards(lambda trials: [Evaluation(1.0)])}, "reward returned 1 evaluations for 3 trials; return one per trial, in order"),
    ({"rewarder": Rewards(lambda trials: [1.0] * len(trials))}, "reward returned float at position 0"),
    ({"updater": Updates(lambda root: [root])}, "again; derive children with a salt that is new"),
    ({"updater": Updates(lambda root: [root.derive(1), root.derive(1)])}, "again; derive children with a salt that is new"),
    ({"updater": Updates(lambda root: [STRANGER])}, "a child needs parents from the lineage"),
    ({"updater": Updates(lambda root: root)}, "update returned Candidate; return a list"),
    ({"evaluator": Evaluates({"a": 1})}, "evaluate returned dict; return a list of"),
    ({"evaluator": Evaluates([("stranger", Evaluation(1.0))])}, "evaluate scored 'stranger'"),
    ({"evaluator": Evaluates([Evaluation(1.0)])}, r"return pairs \(candidate id, Evaluation\)"),
]


@pytest.mark.parametrize(("roles", "message"), BROKEN, ids=[m[:40] for _, m in BROKEN])
def test_a_broken_contract_is_named(tmp_path: Path, roles: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        toy_session(tmp_path, **noop_roles(**roles)).improve()


def test_prepare_returns_a_candidate(tmp_path: Path) -> None:
    class Prepares(NoopRewarder):
        @hookimpl
        def prepare(self) -> Any:
            return "root"

    with pytest.raises(ContractError, match="prepare returned str; return the candidate to start from"):
        toy_session(tmp_path, **noop_roles(rewarder=Prepares()))


@pytest.mark.parametrize("options", [{}, {"tryfirst": True}, {"trylast": True}])
def test_contracts_stand_outside_all_middleware(tmp_path: Path, options: dict[str, bool]) -> None:
    """Whatever a wrapper makes of a result is checked, and a contract never fails on what a wrapper mends."""

    class Spoils:
        @hookimpl(wrapper=True, **options)
        def reward(self) -> Generator[None, Any, Any]:
            return (yield)[:-1]

    class Mends:
        @hookimpl(wrapper=True, **options)
        def reward(self, trials: Any) -> Generator[None, Any, Any]:
            yield
            return [Evaluation(0.0)] * len(trials)

    with pytest.raises(ContractError, match="2 evaluations for 3 trials"):
        toy_session(tmp_path / "spoils", middleware=[Spoils()], **noop_roles()).improve()
    broken = noop_roles(rewarder=Rewards(lambda trials: []))
    assert len(toy_session(tmp_path / "mends", middleware=[Mends()], **broken).improve()) == 2


def test_contracts_are_the_last_to_see_every_hook(tmp_path: Path) -> None:
    session = toy_session(tmp_path, **noop_roles())
    for hook in ("prepare", "select", "propose", "apply", "reward", "update", "evaluate"):
        assert getattr(session.hook, hook).get_hookimpls()[-1].plugin_name == "contracts"


def test_the_empty_round_is_lawful(tmp_path: Path) -> None:
    """No edits, no trials, no children: a round in which nothing came to mind."""
    lineage = toy_session(tmp_path, **noop_roles(edits=0)).improve()
    assert len(lineage) == 2
    assert lineage.size == 1


class ReadsLabels(NoopRewarder):
    uses_labels = False

    @hookimpl
    def reward(self, trials: Any, run: Any) -> Any:
        run.task.labels(run.task.train[0].questions)
        return [Evaluation(0.0) for _ in trials]


class DeclaresLabels(ReadsLabels):
    uses_labels = True


class PreparesLabels(NoopRewarder):
    uses_labels = True

    @hookimpl
    def prepare(self, root: Any, run: Any) -> Any:
        run.task.labels(run.task.train[0].questions)
        return root


def test_an_undeclared_read_of_labels_is_refused_and_costs_nothing(tmp_path: Path) -> None:
    session = toy_session(tmp_path, **noop_roles(rewarder=ReadsLabels()))
    with pytest.raises(LabelError, match=r"ReadsLabels \(in reward\) read labels, but does not declare `uses_labels = True`"):
        session.improve()
    assert session.run.ledger.totals["labels"] == 0
    assert ("answers", "train") not in session.run.task._task.opened  # type: ignore[attr-defined]


def test_declared_labels_are_charged_once_each(tmp_path: Path) -> None:
    session = toy_session(tmp_path, rounds=3, **noop_roles(rewarder=DeclaresLabels()))
    session.improve()
    assert session.run.ledger.totals["labels"] == 3


def test_prepare_may_read_labels_and_pays_for_them(tmp_path: Path) -> None:
    session = toy_session(tmp_path, **noop_roles(rewarder=PreparesLabels()))
    assert session.run.ledger.by_stage["prepare"]["labels"] == 3


def test_a_label_declared_by_one_role_is_not_open_to_another(tmp_path: Path) -> None:
    class Peeks(NoopEditor):
        @hookimpl
        def propose(self, parents: Any, run: Any) -> Any:
            return [Edit((parents[0].id,), Text(str(run.task.labels(run.task.train[0].questions))))]

    with pytest.raises(LabelError, match=r"Peeks \(in propose\)"):
        toy_session(tmp_path, **noop_roles(editor=Peeks(), rewarder=DeclaresLabels())).improve()


def test_the_test_split_is_sealed(tmp_path: Path) -> None:
    class Peeks(NoopEditor):
        @hookimpl
        def propose(self, run: Any) -> Any:
            return run.task.test

    with pytest.raises(SealedError, match="selfimprove eval"):
        toy_session(tmp_path, **noop_roles(editor=Peeks())).improve()
