from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove import records
from selfimprove.compose import Cached, PerPart, Sharded, Staged, WeightedSum, ask
from selfimprove.errors import AdmissionError, ConfigError, ContractError
from selfimprove.hooks import hookimpl
from selfimprove.payloads import Text
from selfimprove.records import Candidate, Edit, Evaluation, Lineage, Part, Trial
from selfimprove.testing import NoopRewarder, RewarderContract, ToyRewarder, ToyUpdater, UpdaterContract, toy_session

ROOT = Candidate.root(policy=Part("model", "m"), reward_model=Part("model", "r"))
LINEAGE = Lineage(ROOT)


class Length:
    """The length of a text, up to a limit; nothing for an empty one. Counts what it was asked."""

    consumes = (Text,)

    def __init__(self, limit: int = 99) -> None:
        self.limit = limit
        self.calls: list[list[str]] = []

    def key(self) -> int:
        return self.limit

    @hookimpl
    def reward(self, trials: Sequence[Trial]) -> Sequence[Evaluation]:
        texts = [t.edit.payload.text for t in trials]
        self.calls.append(texts)
        return [Evaluation(float(min(len(t), self.limit)), per_item={"x": float(len(t))}) if t else Evaluation.failed("empty") for t in texts]


def trials(*texts: str, groups: Sequence[str] | None = None, replicates: int = 1) -> list[Trial]:
    edits = [Edit((ROOT.id,), Text(t), groups[i] if groups else "") for i, t in enumerate(texts)]
    return [Trial(e, ROOT.derive(i, k), k) for i, e in enumerate(edits) for k in range(replicates)]


def scores(rewarder: Any, given_trials: Sequence[Trial], lineage: Lineage = LINEAGE, run: Any = None) -> list[float | None]:
    return [e.score for e in ask(rewarder, "reward", trials=given_trials, lineage=lineage, run=run)]


class TestWeightedSum(RewarderContract):
    def make_plugin(self) -> Any:
        return WeightedSum([ToyRewarder(), ToyRewarder()], [1.0, 0.5])


class TestStaged(RewarderContract):
    def make_plugin(self) -> Any:
        return Staged([Length(), ToyRewarder()], 40)


class TestSharded(RewarderContract):
    def make_plugin(self) -> Any:
        return Sharded(ToyRewarder(), 2)


class TestCached(RewarderContract):
    def make_plugin(self) -> Any:
        return Cached(ToyRewarder())


class TestComposedDeeply(RewarderContract):
    def make_plugin(self) -> Any:
        return Sharded(Cached(Staged([Length(), WeightedSum([ToyRewarder(), Length()], [1, 0.01])], 40)), 3)


class TestPerPart(UpdaterContract):
    def make_plugin(self) -> Any:
        return PerPart(policy=ToyUpdater())


# ---- what is declared inside is declared outside ----


class Numbers:
    consumes = (int,)

    @hookimpl
    def reward(self, trials: Any) -> Any: ...


def test_declarations_are_forwarded() -> None:
    outer = Sharded(WeightedSum([Length(), ToyRewarder(), NoopRewarder()], [1, 1, 1]), 2)
    assert outer.uses_labels
    assert outer.consumes == (Text,)
    assert not WeightedSum([Length()], [1]).uses_labels
    assert WeightedSum([NoopRewarder()], [1]).consumes is None

    class Needs(NoopRewarder):
        needs = ("policy", "code")
        needs_scores = True

    assert WeightedSum([Needs(), Needs()], [1, 1]).needs == ("policy", "code")
    assert WeightedSum([Length(), Needs()], [1, 1]).needs_scores


def test_terms_that_no_edit_suits_are_refused() -> None:
    with pytest.raises(AdmissionError, match="Length consumes Text, but Numbers consumes int"):
        WeightedSum([Length(), Numbers()], [1, 1])


def test_labels_read_inside_are_declared_outside(tmp_path: Path) -> None:
    session = toy_session(tmp_path, rewarder=WeightedSum([Length(), ToyRewarder()], [0.0, 1.0]))
    session.improve()
    assert session.run.ledger.totals["labels"] > 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: WeightedSum([], []), ConfigError, "at least one plugin inside"),
        (lambda: WeightedSum([Length()], [1, 2]), ConfigError, "2 weights for 1 terms"),
        (lambda: Staged([Length(), Length()], [1, 2]), ConfigError, "one threshold, or 1 for 2 stages; got 2"),
        (lambda: Sharded(Length(), 0), ConfigError, "at least 1; got 0"),
        (lambda: Cached(NoopRewarder()), AdmissionError, r"NoopRewarder does not say so with a method `key\(\)`"),
        (lambda: Cached(WeightedSum([Length(), NoopRewarder()], [1, 1])), AdmissionError, "NoopRewarder does not say so"),
        (lambda: Sharded(ToyUpdater(), 1), AdmissionError, "Sharded wants plugins that implement `reward`; ToyUpdater does not"),
        (lambda: PerPart(policy=Length()), AdmissionError, "PerPart wants plugins that implement `update`; Length does not"),
    ],
)
def test_what_cannot_work_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_an_inner_rewarder_that_miscounts_is_named() -> None:
    class Miscounts:
        @hookimpl
        def reward(self) -> Any:
            return []

    for outer in (WeightedSum([Miscounts()], [1]), Sharded(Miscounts(), 9), Staged([Miscounts()], 0)):
        with pytest.raises(ContractError, match=r"Miscounts\.reward returned 0 evaluations for 1 trials"):
            scores(outer, trials("a"))


def test_the_first_prepare_inside_is_taken() -> None:
    class Prepares(Length):
        @hookimpl
        def prepare(self, root: Candidate) -> Candidate:
            return root.derive("prepared")

    assert WeightedSum([Length(), Prepares()], [1, 1]).prepare(ROOT, None) == ROOT.derive("prepared")  # type: ignore[arg-type]
    assert WeightedSum([Length()], [1]).prepare(ROOT, None) is None  # type: ignore[arg-type]


# ---- each of them ----


@given(st.lists(st.text(max_size=5), max_size=6), st.floats(-2, 2, allow_subnormal=False), st.floats(-2, 2, allow_subnormal=False))
def test_a_weighted_sum_is_one(texts: list[str], a: float, b: float) -> None:
    got = scores(WeightedSum([Length(), Length(2)], [a, b]), trials(*texts))
    assert got == [None if not t else pytest.approx(a * len(t) + b * min(2, len(t))) for t in texts]


def test_a_term_without_a_score_says_why() -> None:
    [e] = ask(WeightedSum([Length(), NoopRewarder()], [1, 1]), "reward", trials=trials(""), lineage=LINEAGE, run=_Streams())
    assert e.error == "0.Length: empty"
    assert list(e.metrics) == ["1.NoopRewarder"]


class _Streams:
    folder = Path()

    def rng(self, *name: Any) -> Any:
        import numpy as np

        return np.random.default_rng(0)


def test_a_later_stage_sees_only_what_passed() -> None:
    first, second = Length(3), Length()
    found = ask(Staged([first, second], 3), "reward", trials=trials("a", "", "abcd", "abc"), lineage=LINEAGE, run=None)
    assert second.calls == [["abcd", "abc"]]
    assert [(e.score, e.metrics["stage"]) for e in found] == [(1, 0), (None, 0), (4, 1), (3, 1)]
    never = Length()
    scores(Staged([Length(), never], 9), trials("a"))
    assert never.calls == []


@given(st.lists(st.sampled_from(["", "a", "b", "c"]), max_size=9), st.integers(1, 4), st.integers(1, 3))
def test_shards_keep_groups_whole_and_results_in_order(groups: list[str], size: int, replicates: int) -> None:
    given_trials = trials(*("x" * (i + 1) for i in range(len(groups))), groups=groups, replicates=replicates)
    inner = Length()
    outer = Sharded(inner, size)
    assert scores(outer, given_trials) == scores(Length(), given_trials)
    shards = outer.shards(given_trials)
    assert sorted(i for s in shards for i in s) == list(range(len(given_trials)))
    unit = [t.edit.group or str(id(t.edit)) for t in given_trials]
    for shard in shards:
        assert len(shard) <= size or len({unit[i] for i in shard}) == 1
    for name in set(unit):
        assert sum(any(unit[i] == name for i in s) for s in shards) == 1


def test_equal_trials_are_measured_once_in_a_run(tmp_path: Path) -> None:
    class Run:
        folder = tmp_path

    inner = Length()
    outer = Cached(inner)
    first = trials("a", "b", "a")
    assert scores(outer, first, run=Run()) == [1, 1, 1]
    assert inner.calls == [["a", "b"]]
    second = LINEAGE + records.Round()
    assert scores(outer, trials("b", "cc", ""), second, Run()) == [1, 2, None]
    assert inner.calls[1:] == [["cc", ""]]
    reopened = Length()
    third = second + records.Round()
    assert scores(Cached(reopened), trials("a", "", "cc"), third, Run()) == [1, None, 2]
    assert reopened.calls == []
    replayed = Length()  # the round that measured them is executed again after a kill: it is charged again
    assert scores(Cached(replayed), trials("cc"), second, Run()) == [2]
    assert replayed.calls == [["cc"]]
    other = Length(1)
    assert scores(Cached(other), trials("cc"), third, Run()) == [1], "another configuration does not find it"


class Updates:
    def __init__(self, part: str, extra: dict[str, str] | None = None, count: int = 1) -> None:
        self.part, self.extra, self.count = part, extra or {}, count
        self.saw: list[str] = []

    @hookimpl
    def update(self, lineage: Lineage) -> Sequence[Candidate]:
        parent = lineage.latest
        self.saw.append(parent.parts["policy"].digest)
        parts = {n: Part("values", d) for n, d in {self.part: f"{self.part} on {parent.parts['policy'].digest}", **self.extra}.items()}
        return [parent.derive(self.part, i, **parts) for i in range(self.count)]


def updated(updater: Any) -> list[Candidate]:
    return list(ask(updater, "update", trials=[], rewards=[], lineage=LINEAGE, run=None))


def test_a_later_updater_sees_the_draft_and_one_child_has_both() -> None:
    policy, reward = Updates("policy", {"policy.optimizer": "moments"}), Updates("reward_model", {"policy": "not its business"})
    [child] = updated(PerPart(policy=policy, reward_model=reward))
    assert reward.saw == ["policy on m"]
    assert {n: p.digest for n, p in child.parts.items()} == {
        "policy": "policy on m",
        "policy.optimizer": "moments",
        "reward_model": "reward_model on policy on m",
    }
    assert child.parents == (ROOT.id,)
    assert LINEAGE.size == 1


def test_an_updater_may_leave_its_part_alone() -> None:
    [child] = updated(PerPart(policy=Updates("policy"), reward_model=Updates("x", count=0)))
    assert child.parts["reward_model"] == ROOT.parts["reward_model"]
    [child] = updated(PerPart(policy=Updates("x", count=0), reward_model=Updates("reward_model")))
    assert child.parts["policy"] == ROOT.parts["policy"]
    assert updated(PerPart(policy=Updates("x", count=0))) == []


def test_drafts_that_do_not_match_are_refused() -> None:
    with pytest.raises(ContractError, match=r"Updates \(reward_model\) returned 2 candidates for 1 drafts"):
        updated(PerPart(policy=Updates("policy"), reward_model=Updates("reward_model", count=2)))
