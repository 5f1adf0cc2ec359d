"""Every refusal names the plugin and the remedy, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from selfimprove.errors import AdmissionError
from selfimprove.guards import NonFinite, Plateau, Rounds
from selfimprove.hooks import hookimpl
from selfimprove.payloads import Text, payload
from selfimprove.plugins import admit
from selfimprove.selectors import Best, Latest
from selfimprove.testing import NoopEditor, NoopRewarder, noop_roles, toy_session


@payload("test.number")
@dataclass(frozen=True)
class Number:
    value: int


@dataclass(frozen=True)
class LongText(Text):
    pass


class Nothing:
    pass


class Unmarked:
    def select(self, lineage: Any) -> Any:
        return [lineage.root]


class Misspelt(NoopRewarder):
    @hookimpl
    def rewards(self, trials: Any) -> Any: ...


class StrangeArgument:
    @hookimpl
    def reward(self, trials: Any, temperature: float) -> Any: ...


class WantsNumbers(NoopRewarder):
    consumes = (Number,)


class LearnsNumbers:
    consumes = (Number,)

    @hookimpl
    def update(self) -> Any:
        return []


class PlainMiddleware:
    @hookimpl
    def reward(self) -> Any: ...


class OnlyApplies:
    @hookimpl
    def apply(self) -> Any: ...


class Meddles:
    @hookimpl
    def reward(self) -> Any: ...


GUARD = [Rounds(1)]
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"selector": None}, {}, "no plugin fills the role 'selector'; choose one with `selector=NAME`"),
    ({"editor": None}, {}, "no plugin fills the role 'editor'"),
    ({"rewarder": None}, {}, "no plugin fills the role 'rewarder'"),
    ({"selector": NoopEditor()}, {}, "NoopEditor implements `propose`, which the role 'selector' does not have; use it as the editor"),
    ({"selector": Nothing()}, {}, "Nothing does not implement `select`.*mark its `select` method with @hookimpl"),
    ({"selector": Unmarked()}, {}, "Unmarked does not implement `select`.*mark its `select` method with @hookimpl"),
    ({"editor": OnlyApplies()}, {}, "OnlyApplies does not implement `propose`"),
    ({"rewarder": Misspelt()}, {}, "Misspelt implements `rewards`.*known hooks are"),
    ({"rewarder": StrangeArgument()}, {}, "StrangeArgument .*temperature"),
    ({"critic": NoopRewarder()}, {}, "there is no role 'critic'; the roles are selector, editor, rewarder, updater, evaluator"),
    ({"rewarder": WantsNumbers()}, {}, r"NoopEditor \(editor\) produces Text, but WantsNumbers \(rewarder\) consumes Number"),
    ({"updater": LearnsNumbers()}, {}, r"NoopEditor \(editor\) produces Text, but LearnsNumbers \(updater\) consumes Number"),
    ({}, {"observers": []}, "no guard would ever stop this run; add one"),
    ({}, {"observers": [*GUARD, Meddles()]}, "Meddles implements `reward`, which an observer does not have"),
    ({}, {"observers": [*GUARD, Nothing()]}, "Nothing .*implements no hook"),
    ({}, {"middleware": [PlainMiddleware()]}, r"middleware PlainMiddleware: `reward` is no wrapper; mark it @hookimpl\(wrapper=True\)"),
    ({}, {"middleware": [Rounds(1)]}, "Rounds implements `should_stop`, which middleware does not have"),
]


@pytest.mark.parametrize(("roles", "options", "message"), REFUSED, ids=[m[:45] for _, _, m in REFUSED])
def test_refused(roles: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdmissionError, match=f"(?s){message}"):
        admit(noop_roles(**roles), **{"observers": GUARD, **options})


@pytest.mark.parametrize("plugin", [{"selector": Best()}, {"observers": [Plateau()]}])
def test_scores_that_nobody_gives_are_refused(tmp_path: Path, plugin: dict[str, Any]) -> None:
    with pytest.raises(
        AdmissionError, match=r"(Best \(selector\)|Plateau \(guard\)) needs scores, and no evaluator gives any; choose one with `evaluator=NAME`"
    ):
        toy_session(tmp_path, **noop_roles(**{k: v for k, v in plugin.items() if k == "selector"}), observers=plugin.get("observers", ()))
    assert not (tmp_path / "journal.jsonl").exists()


def test_a_subclass_of_what_is_consumed_is_accepted() -> None:
    class Longer(NoopEditor):
        produces = (LongText,)

    class WantsTexts(NoopRewarder):
        consumes = (Text,)

    admit(noop_roles(editor=Longer(), rewarder=WantsTexts()), GUARD)


def test_what_declares_nothing_meets_anything() -> None:
    class Silent(NoopEditor):
        produces = None  # type: ignore[assignment]

    admit(noop_roles(editor=Silent(), rewarder=WantsNumbers()), GUARD)


def test_managers_share_nothing() -> None:
    first, second = admit(noop_roles(), GUARD), admit(noop_roles(), [Rounds(5), NonFinite()])
    assert not {id(p) for _, p in first.list_name_plugin()} & {id(p) for _, p in second.list_name_plugin() if p is not GUARD[0]} - {id(GUARD[0])}


def test_one_object_may_guard_and_select() -> None:
    class Both(Latest):
        pass

    plugin = Both()
    assert admit(noop_roles(selector=plugin), GUARD).is_registered(plugin)


def test_a_part_that_no_candidate_has_is_asked_for_in_vain(tmp_path: Path) -> None:
    class Reader(NoopRewarder):
        needs = ("code",)

    with pytest.raises(AdmissionError, match=r"Reader \(rewarder\) reads the part 'code' .* have only policy; choose an editor"):
        toy_session(tmp_path, rewarder=Reader())
