"""The public fakes keep the contracts that they are there to test, and the contracts catch what they are there to catch."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from selfimprove.evaluators import RewardIsScore
from selfimprove.graders import Grader
from selfimprove.hooks import hookimpl
from selfimprove.records import Evaluation
from selfimprove.selectors import Latest
from selfimprove.testing import (
    EditorContract,
    EngineContract,
    EvaluatorContract,
    GraderContract,
    NoopEditor,
    NoopRewarder,
    RewarderContract,
    ScriptedEngine,
    SelectorContract,
    ToyEditor,
    ToyEvaluator,
    ToyGrader,
    ToyRewarder,
    ToyUpdater,
    UpdaterContract,
)


class TestToyEditor(EditorContract):
    def make_plugin(self) -> Any:
        return ToyEditor()


class TestNoopEditor(EditorContract):
    def make_plugin(self) -> Any:
        return NoopEditor()


class TestToyRewarder(RewarderContract):
    def make_plugin(self) -> Any:
        return ToyRewarder()


class TestNoopRewarder(RewarderContract):
    order_free = False

    def make_plugin(self) -> Any:
        return NoopRewarder()


class TestToyUpdater(UpdaterContract):
    def make_plugin(self) -> Any:
        return ToyUpdater()


class TestToyEvaluator(EvaluatorContract):
    def make_plugin(self) -> Any:
        return ToyEvaluator()


class TestRewardIsScore(EvaluatorContract):
    def make_plugin(self) -> Any:
        return RewardIsScore()

    def make_roles(self) -> dict[str, Any]:
        return {"editor": NoopEditor(), "rewarder": NoopRewarder(), "updater": None}


class TestToyGrader(GraderContract):
    def make_plugin(self) -> Grader:
        return ToyGrader()


class TestScriptedEngine(EngineContract):
    def make_plugin(self) -> ScriptedEngine:
        return ScriptedEngine(lambda r, known: f"{len(known)} {r.prompt} {r.seed if r.temperature else 0}")


def caught(contract: type, plugin: Any, folder: Path) -> list[str]:
    """The names of the tests of a contract that a plugin fails."""

    class Case(contract):  # type: ignore[misc]
        def make_plugin(self) -> Any:
            return plugin()

    failed = []
    for name, test in inspect.getmembers(Case, inspect.isfunction):
        if name.startswith("test_"):
            arguments = {"tmp_path": folder / name} if "tmp_path" in inspect.signature(test).parameters else {}
            folder.joinpath(name).mkdir()
            try:
                test(Case(), **arguments)
            except Exception:  # noqa: BLE001  (any failure counts)
                failed.append(name)
    return failed


class Forgetful(ToyRewarder):
    """Loses what cannot be measured."""

    @hookimpl
    def reward(self, trials: Any, run: Any) -> Any:
        return [r for r in super().reward(trials, run) if r.score is not None]


class Sneaky(ToyRewarder):
    uses_labels = False


class Moody(NoopRewarder):
    calls = 0

    @hookimpl
    def reward(self, trials: Any) -> Any:
        type(self).calls += 1
        return [Evaluation(float(self.calls + i)) for i in range(len(trials))]


class Unsalted(ToyUpdater):
    @hookimpl
    def update(self, lineage: Any) -> Any:
        return [lineage.root.derive("child")]


class Impure(Latest):
    calls = 0

    @hookimpl
    def select(self, lineage: Any) -> Any:
        type(self).calls += 1
        return [list(lineage)[self.calls % lineage.size]]


class Backwards(ScriptedEngine):
    """Answers the last request first."""

    def generate(self, tile: Any, weights: Any) -> Any:
        found, charges = super().generate(tile, weights)
        return found[::-1], charges


class Foreign(ScriptedEngine):
    """Is paid in another currency."""

    def generate(self, tile: Any, weights: Any) -> Any:
        return super().generate(tile, weights)[0], {"dollars": 1.0}


@pytest.mark.parametrize(
    ("contract", "plugin", "test"),
    [
        (EngineContract, Backwards, "test_texts_follow_their_requests"),
        (EngineContract, Foreign, "test_what_was_computed_is_remembered_and_charged_again"),
        (RewarderContract, Forgetful, "test_a_bad_trial_is_data"),
        (RewarderContract, Sneaky, "test_is_admitted_and_runs"),
        (RewarderContract, Moody, "test_same_trials_same_rewards_and_charges"),
        (RewarderContract, Moody, "test_results_follow_their_trials"),
        (UpdaterContract, Unsalted, "test_the_next_round_makes_other_children"),
        (SelectorContract, Impure, "test_selects_the_same_twice"),
        (SelectorContract, NoopEditor, "test_is_admitted_and_runs"),
    ],
)
def test_a_contract_catches(contract: type, plugin: Any, test: str, tmp_path: Path) -> None:
    assert test in caught(contract, plugin, tmp_path)
