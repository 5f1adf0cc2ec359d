"""The suite fails where a strategy does what it may not; `check` says so in a row; our own plugins pass."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from selfimprove import Evaluation, Lineage, Run, Trial, check, discovery, hookimpl
from selfimprove.check import named, rows
from selfimprove.cli import main
from selfimprove.errors import ConfigError, SealedError
from selfimprove.models import Generate
from selfimprove.session import Parts
from selfimprove.testing import StrategyConformance, ToyEditor, ToyRewarder, ToyTask, conformance, toy_session
from selfimprove.testing.audit import sealed, unsafe_files
from selfimprove.testing.conformance import overrides_of, parts_of
from selfimprove.testing.inspection import heavy_imports, unknown_arguments

PACKAGES = sorted({s.distribution for s in discovery.sources()} - {discovery.CORE})
STRATEGIES = sorted(o.name for s in discovery.sources() for o in s.options() if o.group == "strategy")
TESTS = [n for n, f in vars(StrategyConformance).items() if n.startswith("test_") and callable(f)]


class Toy(StrategyConformance):
    strategy = "toy"


class TestToy(Toy):
    """The core's own strategy."""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "toy"])
@pytest.mark.parametrize("test", TESTS)
def test_our_plugins_conform(strategy: str, test: str, tmp_path: Path) -> None:
    case = type("Case", (StrategyConformance,), {"strategy": strategy})()
    getattr(case, test)(tmp_path)


@pytest.mark.slow  # each imports its modules in a process of its own
@pytest.mark.parametrize("package", PACKAGES)
def test_our_packages_pass_check_without_their_strategies(package: str) -> None:
    assert not [r for r in rows(package, chosen=[]) if not r.passed]


# ---- what it catches ----


class Forgetful(ToyRewarder):
    """Its rewards depend on how many were given before."""

    given = 0

    @hookimpl
    def reward(self, trials: Sequence[Trial], run: Run) -> Sequence[Evaluation]:
        Forgetful.given += 1
        return [Evaluation(float(Forgetful.given)) for _ in trials]


class Counting(ToyRewarder):
    """Its rewards depend on how many rounds this object has seen."""

    def __init__(self) -> None:
        self.seen = 0

    @hookimpl
    def reward(self, trials: Sequence[Trial], run: Run) -> Sequence[Evaluation]:
        self.seen += 1
        return [Evaluation(float(self.seen * (i + 1))) for i, _ in enumerate(trials)]


class Sneaking(ToyRewarder):
    """It takes answers past the ledger."""

    @hookimpl
    def reward(self, trials: Sequence[Trial], run: Run) -> Sequence[Evaluation]:
        answers = dict(run.task._task.answers("train").items())
        return [Evaluation(float(len(answers))) for _ in trials]


class Cheating(ToyRewarder):
    """It looks at the test."""

    @hookimpl
    def reward(self, trials: Sequence[Trial], run: Run) -> Sequence[Evaluation]:
        return [Evaluation(float(len(ToyTask().items("test")))) for _ in trials]


class Unpaid(ToyRewarder):
    """It generates past the ledger."""

    @hookimpl
    def reward(self, trials: Sequence[Trial], run: Run) -> Sequence[Evaluation]:
        tile = [Generate(run.models.root, "Say nothing. " * 40, 64, seed=7)] * 4
        run.models.engine.generate(tile, run.models)
        return [Evaluation(1.0) for _ in trials]


class Pickling(ToyRewarder):
    """It keeps a pickle."""

    @hookimpl
    def reward(self, trials: Sequence[Trial], run: Run) -> Sequence[Evaluation]:
        (run.folder / "state.bin").write_bytes(pickle.dumps([1.0]))
        return [Evaluation(1.0) for _ in trials]


@pytest.mark.parametrize(
    ("rewarder", "test", "message"),
    [
        (Forgetful, "test_it_is_deterministic", "two equal runs differ"),
        (Counting, "test_a_guard_may_stop_it_anywhere", "goes on as another one"),
        (Sneaking, "test_the_ledger_is_honest", "labels"),
        (Cheating, "test_labels_are_declared_and_the_test_stays_sealed", "test split was opened"),
        (Unpaid, "test_the_ledger_is_honest", "were used"),
        (Pickling, "test_what_it_keeps_is_safe_to_load", "state.bin"),
    ],
)
def test_it_catches(rewarder: type[Any], test: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parts(overrides: Sequence[str]) -> Parts:
        honest = parts_of(overrides)
        return dataclasses.replace(honest, roles={**honest.roles, "rewarder": rewarder()})

    monkeypatch.setattr(conformance, "parts_of", parts)
    with pytest.raises((AssertionError, SealedError), match=message):
        getattr(Toy(), test)(tmp_path)


def test_a_run_that_opens_a_file_of_the_test_split_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "test.jsonl"
    secret.write_text("{}")

    class Peeking(ToyRewarder):
        @hookimpl
        def reward(self, trials: Sequence[Trial], run: Run) -> Sequence[Evaluation]:
            return [Evaluation(float(len(secret.read_text()))) for _ in trials]

    def parts(overrides: Sequence[str]) -> Parts:
        honest = parts_of(overrides)
        return dataclasses.replace(honest, roles={**honest.roles, "rewarder": Peeking()})

    monkeypatch.setattr(conformance, "parts_of", parts)
    case = type("Case", (Toy,), {"sealed_files": (secret,)})()
    with pytest.raises(SealedError, match=r"test\.jsonl holds the test split"):
        case.test_labels_are_declared_and_the_test_stays_sealed(tmp_path / "run")


def test_a_file_of_the_test_split_cannot_be_opened(tmp_path: Path) -> None:
    secret, other = tmp_path / "test.jsonl", tmp_path / "train.jsonl"
    secret.write_text("{}")
    other.write_text("{}")
    with sealed(ToyTask(), [secret]):
        assert other.read_text() == "{}"
        with pytest.raises(SealedError, match=r"test\.jsonl"):
            secret.read_text()
    assert secret.read_text() == "{}"


def test_reading_an_answer_is_noticed() -> None:
    task = ToyTask()
    with sealed(task) as read:
        answers = task.answers("train")
        [first, *_] = answers
        assert not read
        assert answers.get("nothing") is None
        answers[first]
        assert read == {first}
        assert len(list(answers.values())) == len(read)
    with pytest.raises(SealedError), sealed(task):
        task.items("test")


@pytest.mark.parametrize(
    ("name", "data", "safe"),
    [
        ("a.json", b"{}", True),
        ("a.json", b"{", False),
        ("b.safetensors", b"junk", False),
        ("c.txt", b"\x80\x04N.", False),
        ("d.txt", b"a\x00", False),
    ],
)
def test_safe_files(name: str, data: bytes, safe: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    assert (unsafe_files(tmp_path) == []) is safe


def test_hooks_name_what_they_are_given() -> None:
    class Strange:
        @hookimpl
        def reward(self, trials: Any, mood: Any, spare: int = 1) -> Any:
            return None

        @hookimpl
        def praise(self) -> Any:
            return None

    found = unknown_arguments(Strange)
    assert len(found) == 2
    assert any("'mood'" in f for f in found)
    assert any("is no hook" in f for f in found)
    assert unknown_arguments(ToyEditor) == []


def test_heavy_imports() -> None:
    assert heavy_imports(["matplotlib", "json"]) == ["matplotlib"]
    with pytest.raises(AssertionError, match="cannot be imported"):
        heavy_imports(["no_such_module"])


# ---- check ----


def test_check_names_its_rows() -> None:
    found = [r for r in rows("selfimprove-srt", chosen=["srt"]) if not r.what.startswith("srt:")]
    assert all(r.passed for r in found), [r for r in found if not r.passed]
    assert {"installation", "option names", "import", "rewarder=majority", "strategy=srt"} <= {r.what for r in found}


def test_check_takes_options_that_refer_to_others() -> None:
    [option] = [o for o in discovery.core().options() if (o.group, o.name) == ("engine", "toy")]
    assert "${" in option.text
    check._option(option)


@pytest.mark.parametrize(("package", "hint"), [("selfimprove-sr", "selfimprove-srt"), ("nothing", "installed:")])
def test_check_of_what_is_not_installed(package: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", package]) == 2
    assert hint in capsys.readouterr().err


def test_check_of_another_strategy() -> None:
    with pytest.raises(ConfigError, match="it has srt"):
        list(rows("selfimprove-srt", chosen=["seal"]))
    assert named("selfimprove_srt") == named("selfimprove-srt")


def test_a_strategy_says_how_it_is_checked() -> None:
    assert "grader=exact" in overrides_of("srt")
    assert overrides_of("toy") == ()
    settings = type("Case", (StrategyConformance,), {"strategy": "srt"})().settings()
    assert len({s.partition("=")[0] for s in settings}) == len(settings)


def test_observers_and_middleware_have_contracts(tmp_path: Path) -> None:
    from selfimprove.testing import MiddlewareContract, ObserverContract

    class Meddling:
        @hookimpl
        def round_finished(self, lineage: Lineage, run: Run) -> None:
            run.ledger.charge(labels=1)

    class Case(ObserverContract):
        def make_plugin(self) -> Any:
            return Meddling()

    with pytest.raises(AssertionError, match="when it is watched"):
        Case().test_it_changes_nothing(tmp_path)

    class Dropping:
        @hookimpl(wrapper=True)
        def reward(self) -> Any:
            rewards = yield
            return rewards[:0]

    class Wrapper(MiddlewareContract):
        def make_plugin(self) -> Any:
            return Dropping()

    broken: Callable[[Path], None] = Wrapper().test_what_could_not_be_measured_passes
    with pytest.raises(Exception, match="one per trial"):
        broken(tmp_path / "w")
    assert toy_session(tmp_path / "toy", rounds=1).improve().size == 2
