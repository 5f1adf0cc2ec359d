"""A real model that rewards itself for agreeing collapses: the reward nears 1, the truth 0; a guard stops it, and a selector goes back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from selfimprove.collapse import BeforeCollapse, Collapse
from selfimprove.graders import Exact
from selfimprove.guards import Rounds
from selfimprove.hooks import hookimpl
from selfimprove.identity import digest
from selfimprove.models import Lora
from selfimprove.models.torch_engine import TorchEngine
from selfimprove.payloads import Rollout
from selfimprove.policy_gradient import PolicyGradient
from selfimprove.records import Evaluation, Lineage, Trial
from selfimprove.rollouts import PassAtK, Rollouts
from selfimprove.selectors import Latest
from selfimprove.session import Parts, Session
from selfimprove.task import Item, Question, Split
from selfimprove.truth import TruthMonitor, truth_of

ROUNDS = 16
BOUNDS = {"kl": 1.5}


class Sums:
    """Sums of two words' numbers, modulo the number of words."""

    name = "sums"

    def _made(self, split: Split) -> list[tuple[int, int]]:
        start = {"train": 0, "validation": 8, "test": 12}[split]
        return [(n * 7 % 46, n * 11 % 46) for n in range(start, start + (8 if split == "train" else 4))]

    def items(self, split: Split) -> Sequence[Item]:
        return [Item(f"{split}{i}", "", "", (Question(f"{split}{i}/0", f"w{a} w{b}"),)) for i, (a, b) in enumerate(self._made(split))]

    def answers(self, split: Split) -> Mapping[str, tuple[str, ...]]:
        return {f"{split}{i}/0": (f"w{(a + b) % 46}",) for i, (a, b) in enumerate(self._made(split))}

    def fingerprint(self, split: Split) -> str:
        return digest("sums", split)


class Agreement:
    """1 for the answer that most rollouts of its question give."""

    consumes = (Rollout,)

    @hookimpl
    def reward(self, trials: Sequence[Trial]) -> Sequence[Evaluation]:
        texts: dict[str, list[str]] = {}
        for t in trials:
            texts.setdefault(t.edit.group, []).append(t.edit.payload.text)
        modes = {g: Counter(found).most_common(1)[0][0] for g, found in texts.items()}
        return [Evaluation(float(t.edit.payload.text == modes[t.edit.group])) for t in trials]


def trained(engine: TorchEngine, folder: Path, observers: Sequence[Any] = (), selector: Any = None) -> Lineage:
    roles = {
        "selector": selector or Latest(),
        "editor": Rollouts({"template": "{question}", "chat": False, "max_tokens": 1}, 0, 8),  # type: ignore[arg-type]
        "rewarder": Agreement(),
        "updater": PolicyGradient(Lora(4, 8, ("q_proj", "v_proj", "up_proj", "down_proj"), 0.1, 1, batch=64)),
        "evaluator": PassAtK(1, greedy=False),
    }
    parts = Parts(roles, engine, Sums(), Exact(), [Rounds(ROUNDS), *observers], [TruthMonitor()], seed=5)
    return Session(parts, folder).improve()


@pytest.fixture(scope="module")
def collapsed(engines: Callable[..., TorchEngine], tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    return trained(engines(), tmp_path_factory.mktemp("collapsed"))


def test_unguarded_it_collapses(collapsed: Lineage) -> None:
    first, late = truth_of(collapsed.round(0)), [truth_of(collapsed.round(i)) for i in range(ROUNDS // 2, ROUNDS)]
    assert len(collapsed) == ROUNDS
    assert first["reward"] < 0.5
    assert max(m["reward"] for m in late) > 0.85
    assert max(m["accuracy"] for m in late) < 0.15
    assert min(m["entropy"] for m in late) < first["entropy"] / 2  # it says the same again and again


def test_a_guard_stops_it(engines: Callable[..., TorchEngine], collapsed: Lineage, tmp_path: Path) -> None:
    stopped = trained(engines(), tmp_path, observers=[Collapse(above=BOUNDS)])
    assert len(stopped) < ROUNDS
    assert [r.children for r in stopped.rounds] == [r.children for r in collapsed.rounds[: len(stopped)]]
    assert truth_of(stopped.round(-1))["kl"] > BOUNDS["kl"]


def test_a_selector_goes_on_from_before(engines: Callable[..., TorchEngine], tmp_path: Path) -> None:
    lineage = trained(engines(), tmp_path, selector=BeforeCollapse(above=BOUNDS))
    healthy = {p for r in lineage.rounds if truth_of(r)["kl"] <= BOUNDS["kl"] for p in r.parents}
    fallen = [r for r in lineage.rounds if truth_of(r)["kl"] > BOUNDS["kl"]]
    assert fallen  # it did collapse on the way
    [kept] = BeforeCollapse(above=BOUNDS).select(lineage)
    assert kept.id in healthy or not any(kept.id in r.parents for r in lineage.rounds)
    assert all(kept.id not in r.parents for r in fallen)
