"""Which edits and lines ReST-EM keeps, and what it then trains on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove.errors import ConfigError
from selfimprove.models import Document, Lora
from selfimprove.records import Candidate, Edit, Evaluation, Part, Trial
from selfimprove.testing import ToyTask, toy_session
from selfimprove_seal import ReSTEM
from selfimprove_seal.editor import SelfEdit

Make = Callable[..., Any]
LORA = Lora(1, 1, ("q_proj",), 1.0, 1, merge=True)
ROOT = Candidate.root(policy=Part("model", "m"))
SCORES = st.none() | st.floats(-1, 1, allow_subnormal=False) | st.sampled_from([0.0, 0.5, math.nan, math.inf, -math.inf])


def edit(name: str, group: str, turns: Sequence[tuple[str, str]] = ()) -> Edit:
    return Edit((ROOT.id,), SelfEdit(name, "prompt", group, tuple(turns) or (("prompt", name),)), group)


def trials_of(table: Sequence[Sequence[Sequence[float | None]]]) -> tuple[list[Trial], list[Evaluation]]:
    """Trials and rewards from scores by group, edit and replicate."""
    trials, rewards = [], []
    for g, group in enumerate(table):
        for e, replicates in enumerate(group):
            written = edit(f"{g}.{e}", str(g))
            for r, score in enumerate(replicates):
                trials.append(Trial(written, ROOT.derive(g, e, r), r))
                rewards.append(Evaluation.failed("not measured") if score is None else Evaluation(score))
    return trials, rewards


def names(kept: Sequence[Edit]) -> list[str]:
    return [e.payload.text for e in kept]


def mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


TABLES = st.lists(st.lists(st.lists(SCORES, min_size=1, max_size=3), min_size=1, max_size=5), min_size=0, max_size=4)


@given(TABLES, st.integers(1, 4), st.none() | st.floats(-1, 1, allow_subnormal=False), st.booleans())
def test_laws_of_keeping(table: list[list[list[float | None]]], keep: int, threshold: float | None, distinct: bool) -> None:
    kept = names(ReSTEM(LORA, keep=keep, threshold=threshold, distinct=distinct).kept(*trials_of(table)))
    assert len(set(kept)) == len(kept)
    assert [int(n.split(".")[0]) for n in kept] == sorted(int(n.split(".")[0]) for n in kept), "context after context"
    for g, group in enumerate(table):
        values = {f"{g}.{e}": mean(r) for e, r in enumerate(group)}
        finite = {n: v for n, v in values.items() if v is not None and math.isfinite(v)}
        ours = [n for n in kept if n in values]
        assert len(ours) <= keep
        assert set(ours) <= set(finite), "what was not measured, or is not finite, is never kept"
        lowest = min((finite[n] for n in ours), default=None)
        assert all(threshold is None or finite[n] > threshold for n in ours)
        if distinct and len(finite) > 1 and len(set(finite.values())) == 1:
            assert ours == []
        else:
            enough = [v for v in finite.values() if threshold is None or v > threshold]
            assert len(ours) == min(keep, len(enough))
            assert all(lowest is not None and v <= lowest for n, v in finite.items() if n not in ours and (threshold is None or v > threshold))


def test_the_mean_over_replicates_decides() -> None:
    table = [[[0.9, 0.0], [0.5, 0.5], [None, 0.6]]]
    assert names(ReSTEM(LORA).kept(*trials_of(table))) == ["0.2"]
    assert names(ReSTEM(LORA, keep=2).kept(*trials_of(table))) == ["0.2", "0.1"]


def test_of_equals_the_first_is_kept() -> None:
    assert names(ReSTEM(LORA).kept(*trials_of([[[0.5], [0.5]], [[0.1], [0.2], [0.2]]]))) == ["0.0", "1.1"]


def test_a_context_without_a_difference() -> None:
    table = [[[0.5], [0.5]], [[0.1], [0.2]], [[0.3]]]
    assert names(ReSTEM(LORA, distinct=True).kept(*trials_of(table))) == ["1.1", "2.0"]


# ---- lines ----


def credited(updater: ReSTEM, rows: Sequence[tuple[Sequence[tuple[str, str]], Sequence[float] | None]]) -> list[tuple[str, str]]:
    """Kept (prompt, line) pairs of edits given as (turns, credit)."""
    trials, rewards = [], []
    for i, (turns, credit) in enumerate(rows):
        trials.append(Trial(edit(str(i), "g", turns), ROOT.derive(i)))
        rewards.append(Evaluation.failed("no") if credit is None else Evaluation(0.0, credit=tuple(credit)))
    return [turn for _, turn in updater.credited(trials, rewards)]


def test_the_best_lines_of_every_prompt() -> None:
    rows = [
        ([("p1", "a"), ("p2", "x")], [0.2, -0.1]),
        ([("p1", "b"), ("p2", "y")], [0.4, 0.0]),
        ([("p1", "c"), ("p2", "x")], [0.1, 0.3]),
        ([("p1", "d"), ("p2", "z")], None),
    ]
    assert credited(ReSTEM(LORA, lines=True), rows) == [("p1", "b"), ("p2", "x")]
    assert credited(ReSTEM(LORA, lines=True, keep=2), rows) == [("p1", "b"), ("p1", "a"), ("p2", "x")]
    assert credited(ReSTEM(LORA, lines=True, keep=9, threshold=0.3), rows) == [("p1", "b")]


@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from("pq"), st.sampled_from("abcd"), st.floats(-1, 1, allow_subnormal=False)), min_size=1, max_size=4),
        max_size=6,
    ),
    st.integers(1, 3),
)
def test_laws_of_lines(edits: list[list[tuple[str, str, float]]], keep: int) -> None:
    found = credited(ReSTEM(LORA, lines=True, keep=keep), [([(p, t) for p, t, _ in e], [c for _, _, c in e]) for e in edits])
    best: dict[tuple[str, str], float] = {}
    for p, line, c in (row for e in edits for row in e):
        best[p, line] = max(c, best.get((p, line), c))
    assert len(set(found)) == len(found), "a line is trained on once"
    for prompt in "pq":
        lines = [t for t in found if t[0] == prompt]
        assert len(lines) <= keep
        assert all(best[t] > 0 for t in lines), "only what taught something"
        assert len(lines) == min(keep, sum(v > 0 for (p, _), v in best.items() if p == prompt))
        assert all(best[t] >= v for t in lines for (p, q), v in best.items() if p == prompt and (p, q) not in found)


def test_a_rewarder_without_credit_is_named() -> None:
    with pytest.raises(ConfigError, match=r"credit for each of an edit's 2 lines.*gave 0; choose rewarder=accuracy"):
        credited(ReSTEM(LORA, lines=True), [([("p", "a"), ("p", "b")], [])])


# ---- training ----


def updated(tmp_path: Path, engine: Any, updater: ReSTEM, roles: dict[str, Any]) -> Any:
    return toy_session(tmp_path, rounds=2, engine=engine, **{**roles, "updater": updater}).improve()


@pytest.mark.parametrize("restart", [False, True])
def test_where_the_m_step_starts(tmp_path: Path, roles: Make, recorder: Make, restart: bool) -> None:
    engine = recorder(facts=ToyTask().facts)
    lineage = updated(tmp_path, engine, ReSTEM(LORA, restart=restart), roles())
    [one], [two] = lineage.round(0).children, lineage.round(1).children
    merged = [t for t in engine.trained if t.lora.merge]
    assert [t.policy for t in merged] == [lineage.root.parts["policy"], (lineage.root if restart else one).parts["policy"]]
    assert (one.parents, two.parents) == ((lineage.root.id,), (one.id,))
    assert merged[0].seed != merged[1].seed


def test_it_trains_on_the_prompts_and_what_was_written(tmp_path: Path, roles: Make, recorder: Make) -> None:
    engine = recorder(facts=ToyTask().facts)
    lineage = updated(tmp_path, engine, ReSTEM(LORA), roles())
    first = lineage.round(0)
    kept = ReSTEM(LORA).kept(first.trials, first.rewards)
    merged = next(t for t in engine.trained if t.lora.merge)
    assert merged.documents == tuple(Document(c, p) for e in kept for p, c in e.payload.turns if c.strip())
    assert kept


def test_no_kept_edit_makes_no_child(tmp_path: Path, roles: Make, recorder: Make) -> None:
    engine = recorder(facts=ToyTask().facts)
    lineage = updated(tmp_path, engine, ReSTEM(LORA, threshold=5.0), roles())
    assert lineage.size == 1
    assert not any(t.lora.merge for t in engine.trained)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, r"updater\.keep is at least 1; got 0"),
        ({"lora": {"rank": 1}}, r"updater\.lora does not fit"),
        ({"lora": {**dict.fromkeys(("rank", "alpha", "learning_rate", "epochs"), 1), "targets": ["q"], "ranks": 1}}, "its fields are rank"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReSTEM(**{"lora": LORA, **options})


def test_what_it_trains_is_merged_whatever_the_settings_say() -> None:
    lora = ReSTEM({"rank": 1, "alpha": 1, "targets": ["q_proj"], "learning_rate": 1.0, "epochs": 1, "merge": False}).lora
    assert isinstance(lora, Lora)
    assert lora.merge
