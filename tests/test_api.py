"""The hooks have a version: another one is refused, new arguments break nobody, what goes away warns once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pluggy
import pytest

from selfimprove import Evaluation, Trial, config, deprecation, discovery, hookimpl, hooks, plugins
from selfimprove.deprecation import PluginDeprecationWarning, deprecated
from selfimprove.discovery import Source
from selfimprove.errors import ConfigError
from selfimprove.guards import Rounds
from selfimprove.testing import NoopRewarder, noop_roles


@pytest.mark.parametrize(("api", "remedy"), [("v2", "upgrade selfimprove"), ("v0", "that has v0"), ("soon", "that has soon")])
def test_another_version_is_refused_with_the_remedy(api: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    [srt] = [s for s in discovery.sources() if s.distribution == "selfimprove-srt"]
    other = Source(srt.distribution, srt.version, srt.package, srt.requires, srt.modules, api)
    reason = other.broken()
    assert reason is not None
    assert remedy in reason
    assert api in reason
    assert discovery.API in reason
    monkeypatch.setattr(discovery, "sources", lambda: [discovery.core(), other])
    with pytest.raises(ConfigError, match="is refused: it is written for version"):
        config.located("selfimprove_srt.MajorityVote", "rewarder", [discovery.core(), other])
    assert config.located("selfimprove.rewarders.Chance", "rewarder", [discovery.core(), other]), "everything else works"


def test_our_plugins_name_the_version() -> None:
    assert {s.api for s in discovery.sources()} == {hooks.API}


def test_a_new_argument_of_a_hook_breaks_no_plugin() -> None:
    class Newer:
        @hooks.hookspec(firstresult=True)
        def reward(self, trials: Sequence[Trial], lineage: Any, run: Any, deadline: float) -> Any: ...

    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(Newer)
    manager.register(NoopRewarder())

    class Run:
        def rng(self, *name: Any) -> Any:
            return self

        def random(self, n: int) -> list[float]:
            return [0.5] * n

    [reward] = manager.hook.reward(trials=[None], lineage=[], run=Run(), deadline=1.0)
    assert reward == Evaluation(0.5)


def test_a_deprecation_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deprecation, "_WARNED", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            deprecated("the option old", "new")
    [warning] = caught
    assert warning.category is PluginDeprecationWarning
    assert "use new" in str(warning.message)


def test_a_deprecated_argument_warns_when_a_plugin_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        @hookimpl
        def reward(self, trials: Sequence[Trial], lineage: Any) -> Sequence[Evaluation]:
            return [Evaluation(1.0) for _ in trials]

    monkeypatch.setattr(deprecation, "_WARNED", set())
    monkeypatch.setitem(plugins.DEPRECATED, ("reward", "lineage"), "run.lineage")
    with pytest.warns(PluginDeprecationWarning, match=r"`lineage` of `reward`, which Old names.*use run\.lineage"):
        plugins.admit(noop_roles(rewarder=Old()), [Rounds(1)])
    plugins.admit(noop_roles(rewarder=Old()), [Rounds(1)])  # a second warning would be an error here
