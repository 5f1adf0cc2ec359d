from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove import records
from selfimprove.errors import ContractError
from selfimprove.payloads import Text
from selfimprove.records import Candidate, Edit, Evaluation, Lineage, Part, Round, Trial

ROOT = Candidate.root(policy=Part("model", "m"))

numbers = st.floats(allow_nan=False, allow_infinity=False, width=32, allow_subnormal=False)
texts = st.text(max_size=8)
evaluations = st.one_of(
    st.builds(
        Evaluation,
        score=numbers,
        metrics=st.dictionaries(texts, numbers, max_size=2),
        per_item=st.dictionaries(texts, numbers, max_size=3),
        credit=st.lists(numbers, max_size=3).map(tuple),
        experience=st.lists(st.builds(Text, texts, texts, texts), max_size=2).map(tuple),
        artifacts=st.dictionaries(texts, texts, max_size=2),
    ),
    st.builds(Evaluation.failed, texts),
)


@st.composite
def histories(draw: st.DrawFn) -> list[Round]:
    """Rounds in which children have any members as parents, and any member is scored at any time."""
    members, rounds = [ROOT], []
    for _ in range(draw(st.integers(0, 6))):
        children = []
        for i in range(draw(st.integers(0, 3))):
            parents = draw(st.lists(st.sampled_from(members), min_size=1, max_size=3))
            child = parents[0].derive(len(members), i)
            children.append(Candidate(child.id, child.parts, tuple(p.id for p in parents)))
        scored = draw(st.lists(st.sampled_from(members + children), max_size=4))
        rounds.append(Round(parents=(ROOT.id,), children=tuple(children), scores=tuple((c.id, draw(evaluations)) for c in scored)))
        members += children
    return rounds


def grown(rounds: list[Round]) -> Lineage:
    lineage = Lineage(ROOT)
    for r in rounds:
        lineage = lineage + r
    return lineage


def facts(lineage: Lineage) -> dict[str, Any]:
    """Everything that a lineage answers, by definition and not by its columns."""
    rounds = lineage.rounds
    members = [ROOT, *(c for r in rounds for c in r.children)]
    scores: dict[str, float] = {}
    for c in members:
        found = [(max(1, len(e.per_item)), e.score) for r in rounds for i, e in r.scores if i == c.id and e.score is not None]
        if found:
            scores[c.id] = sum(w * s for w, s in found) / sum(w for w, _ in found)
    return {
        "members": [c.id for c in members],
        "scores": scores,
        "children": {c.id: sum(c.id in d.parents for d in members) for c in members},
        "round_of": {c.id: next((i for i, r in enumerate(rounds) if c in r.children), -1) for c in members},
    }


def check(lineage: Lineage) -> None:
    expected = facts(lineage)
    members = expected["members"]
    assert [c.id for c in lineage] == members
    assert [c.id for c in reversed(lineage)] == members[::-1]
    assert lineage.size == len(members)
    assert lineage.latest.id == members[-1]
    for i in members:
        assert i in lineage
        assert lineage[i].id == i
        assert lineage.score(i) == pytest.approx(expected["scores"].get(i))
        assert lineage.evaluations(i) == [e for r in lineage.rounds for scored, e in r.scores if scored == i]
        assert lineage.child_count(i) == expected["children"][i]
        assert lineage.round_of(i) == expected["round_of"][i]
    best = lineage.best()
    scores = {i: s for i in members if (s := lineage.score(i)) is not None}
    assert (best.id if best else None) == (max(scores, key=lambda i: scores[i]) if scores else None)  # max takes the oldest of equals


@given(histories())
def test_every_view_answers_by_definition_for_ever(rounds: list[Round]) -> None:
    views = [Lineage(ROOT)]
    for r in rounds:
        views.append(views[-1] + r)
    for n, view in enumerate(views):  # all of them, after the last round came
        assert view.rounds == tuple(rounds[:n])
        check(view)


@given(histories(), histories(), st.data())
def test_an_older_view_grows_a_branch_of_its_own(rounds: list[Round], others: list[Round], data: st.DataObject) -> None:
    trunk = grown(rounds)
    older = Lineage(ROOT)
    for r in rounds[: data.draw(st.integers(0, len(rounds)))]:
        older = older + r
    branch = older
    for i, r in enumerate(others):
        salted = tuple(older.root.derive("branch", i, j) for j, _ in enumerate(r.children))
        branch = branch + Round(children=salted, scores=tuple((c.id, Evaluation(0.5)) for c in salted))
    check(trunk)
    check(branch)
    check(older)


def test_growing_a_view_does_not_change_it() -> None:
    view = Lineage(ROOT)
    child = ROOT.derive(0)
    grew = view + Round(children=(child,), scores=((ROOT.id, Evaluation(1.0)),))
    assert child.id not in view
    assert view.score(ROOT.id) is None
    assert view.best() is None
    with pytest.raises(KeyError):
        view[child.id]
    with pytest.raises(KeyError):
        view.round_of(child.id)
    with pytest.raises(IndexError, match="0 rounds"):
        view.round(-1)
    assert grew.latest == child
    assert grew.best() == ROOT


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Round(children=(ROOT.derive("new"), ROOT)), "already in the lineage"),
        (Round(children=(ROOT.derive("new"), ROOT.derive("new"))), "already in the lineage"),
        (Round(children=(ROOT.derive("new"),), scores=(("stranger", Evaluation(1.0)),)), "not in the lineage"),
    ],
)
def test_a_refused_round_leaves_no_trace(bad: Round, message: str) -> None:
    lineage = Lineage(ROOT)
    with pytest.raises(ContractError, match=message):
        lineage + bad
    check(lineage)
    check(lineage + Round(children=(ROOT.derive("new"),)))


def test_the_best_score_may_fall() -> None:
    a, b = ROOT.derive("a"), ROOT.derive("b")
    first = Lineage(ROOT) + Round(children=(a, b), scores=((a.id, Evaluation(0.9)), (b.id, Evaluation(0.5))))
    second = first + Round(scores=((a.id, Evaluation(-3.0)),))
    assert first.best() == a
    assert second.best() == b
    third = second + Round(scores=((b.id, Evaluation(math.inf)),))
    assert third.best() == a


@given(evaluations)
def test_an_evaluation_survives_json(e: Evaluation) -> None:
    assert records.decode_evaluation(json.loads(json.dumps(records.encode_evaluation(e)))) == e


@given(st.lists(st.tuples(texts, texts, evaluations, st.integers(0, 3)), max_size=4))
def test_a_round_survives_json(rows: list[tuple[str, str, Evaluation, int]]) -> None:
    trials, rewards = [], []
    for i, (text, group, e, replicates) in enumerate(rows):
        edit = Edit((ROOT.id,), Text(text), group)
        for k in range(replicates + 1):
            trials.append(Trial(edit, ROOT.derive(i, k), k, e.error))
            rewards.append(e)
    children = tuple(t.candidate for t in trials)
    r = Round((ROOT.id,), tuple(trials), tuple(rewards), children, tuple((c.id, e) for c, e in zip(children, rewards, strict=True)))
    decoded = records.decode_round(json.loads(json.dumps(records.encode_round(r))))
    assert decoded == r
    assert len({id(t.edit) for t in decoded.trials}) == len({id(t.edit) for t in r.trials}), "replicates share their edit"
    assert records.encode_round(decoded) == records.encode_round(r)


def test_a_child_differs_by_parent_parts_and_salt() -> None:
    part = Part("adapter", "a")
    ids = [ROOT.id, ROOT.derive().id, ROOT.derive(0).id, ROOT.derive("0").id, ROOT.derive(policy=part).id, ROOT.derive(0).derive(0).id]
    assert len(set(ids)) == len(ids)
    assert ROOT.derive(0, policy=part) == ROOT.derive(0, policy=part)
    assert ROOT.derive(0).parents == (ROOT.id,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Edit((), Text("x")), "at least one parent"),
        (lambda: Evaluation(None), "a score or an error"),
        (lambda: Evaluation(1.0, error="no"), "a score or an error"),
        (lambda: Evaluation("1"), "got str"),  # type: ignore[arg-type]
    ],
)
def test_records_check_themselves(make: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        make()
