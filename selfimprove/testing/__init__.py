"""What a plugin's tests are made of: models without weights, a toy task, and the contract of every role as a test class.

* **Contracts** to inherit: `SelectorContract`, `EditorContract`, `RewarderContract`, `UpdaterContract`, `EvaluatorContract`, `MiddlewareContract`,
  `ObserverContract`, `TaskContract`, `GraderContract`, `EngineContract`, and `StrategyConformance` for a whole strategy.
* **Models** without weights: `ScriptedEngine` answers and learns by rule, `TabularEngine` is a table of logits that learns by gradient in
  milliseconds, `LoopbackServer` is a server that follows a script.
* **Sessions**: `toy_session` puts a plugin among the toy roles (`toy_roles`), `noop_roles` call no model.
* **Kills**: `kill_points` and `digest_after_kill` for plugins that keep something of their own.

from selfimprove.testing import RewarderContract, toy_session

class TestMyRewarder(RewarderContract):
    def make_plugin(self) -> MyRewarder:
        return MyRewarder(weight=0.5)

def test_it_improves(tmp_path: Path) -> None:
    lineage = toy_session(tmp_path, rounds=3, rewarder=MyRewarder()).improve()
    assert lineage.score(lineage.latest.id) > lineage.score(lineage.round(0).children[0].id)
"""

from selfimprove.testing.conformance import StrategyConformance
from selfimprove.testing.contracts import (
    EditorContract,
    EngineContract,
    EvaluatorContract,
    GraderContract,
    MiddlewareContract,
    ObserverContract,
    RewarderContract,
    SelectorContract,
    TaskContract,
    UpdaterContract,
)
from selfimprove.testing.engine import Script, ScriptedEngine, ScriptedModel
from selfimprove.testing.kill import digest_after_kill, kill_points
from selfimprove.testing.server import LoopbackServer
from selfimprove.testing.tabular import TabularEngine
from selfimprove.testing.toys import (
    NoopEditor,
    NoopRewarder,
    ToyEditor,
    ToyEvaluator,
    ToyGrader,
    ToyRewarder,
    ToyTask,
    ToyUpdater,
    noop_roles,
    toy_roles,
    toy_session,
)

__all__ = [
    "EditorContract",
    "EngineContract",
    "EvaluatorContract",
    "GraderContract",
    "LoopbackServer",
    "MiddlewareContract",
    "NoopEditor",
    "NoopRewarder",
    "ObserverContract",
    "RewarderContract",
    "Script",
    "ScriptedEngine",
    "ScriptedModel",
    "SelectorContract",
    "StrategyConformance",
    "TabularEngine",
    "TaskContract",
    "ToyEditor",
    "ToyEvaluator",
    "ToyGrader",
    "ToyRewarder",
    "ToyTask",
    "ToyUpdater",
    "UpdaterContract",
    "digest_after_kill",
    "kill_points",
    "noop_roles",
    "toy_roles",
    "toy_session",
]
