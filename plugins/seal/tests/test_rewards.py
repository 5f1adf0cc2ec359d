"""Gains, the credit of lines, and that nothing is asked with the book open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove.errors import AdmissionError
from selfimprove.models import Document, Train
from selfimprove.records import Edit, Trial
from selfimprove.session import Session
from selfimprove.task import Item
from selfimprove.testing import ToyTask, toy_session
from selfimprove_seal import Accuracy, InnerLoop, LogLikelihood, SelfEdits, ToolEdits
from selfimprove_seal.editor import SelfEdit
from selfimprove_seal.prompts import sentences
from selfimprove_seal.rewards import line_credit

Make = Callable[..., Any]


@pytest.fixture
def session(tmp_path: Path, roles: Make) -> Session:
    return toy_session(tmp_path / "run", **roles())


def taught(session: Session, number: int, *texts: str) -> Trial:
    """A trial on the first item, trained on these texts."""
    item, root = session.run.task.train[0], session.lineage.root
    lora = session.run.roles["editor"].inner.settings()
    [trained] = session.run.models.train([Train(root.parts["policy"], tuple(Document(t) for t in texts), lora)])
    written = Edit((root.id,), SelfEdit("\n".join(texts), "", item.id, tuple(("p", t) for t in texts)), item.id)
    return Trial(written, root.derive("t", number, policy=trained.policy))


def test_accuracy_is_the_gain_over_the_parent(session: Session) -> None:
    item = session.run.task.train[0]
    facts = sentences(item.context)
    trials = [taught(session, i, *facts[:i], "filler") for i in range(4)]
    rewards = Accuracy().reward(trials, session.lineage, session.run)
    assert [r.score for r in rewards] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert all(r.metrics["parent"] == 0.0 and r.metrics["value"] == r.score for r in rewards)
    assert all(set(r.per_item) == {q.id for q in item.questions} for r in rewards)


def test_log_likelihood_has_no_ties_and_the_same_order(session: Session) -> None:
    facts = sentences(session.run.task.train[0].context)
    scores = [r.score for r in LogLikelihood().reward([taught(session, i, *facts[:i], "x") for i in range(4)], session.lineage, session.run)]
    assert scores[0] == pytest.approx(0.0)
    assert scores == sorted(scores)
    assert len(set(scores)) == 4


def test_a_failed_trial_keeps_its_reason(session: Session) -> None:
    good = taught(session, 0, "filler")
    void = Trial(good.edit, session.lineage.root.derive("void"), error="the edit is empty")
    rewards = Accuracy().reward([void, good, void], session.lineage, session.run)
    assert [r.error for r in rewards] == ["the edit is empty", None, "the edit is empty"]


def test_without_an_inner_loop_they_say_what_to_choose(tmp_path: Path) -> None:
    with pytest.raises(AdmissionError, match=r"choose `editor=seal` or `editor=seal_tools`|consumes"):
        toy_session(tmp_path, rewarder=Accuracy()).improve()


# ---- credit ----


def credits(
    session: Session, lines: Sequence[Sequence[str]], values: Sequence[Sequence[float]], groups: Sequence[str] = ()
) -> list[tuple[float, ...]]:
    """The credit of edits with these lines, whose trials have these values on the first item's questions."""
    item = session.run.task.train[0]
    root = session.lineage.root
    trials = [
        Trial(
            Edit((root.id,), SelfEdit("", "", item.id, tuple(("p", t) for t in turns)), groups[i] if groups else "g"),
            root.derive("c", i),
        )
        for i, turns in enumerate(lines)
    ]
    table = [{q.id: v for q, v in zip(item.questions, row, strict=True)} for row in values]
    found = line_credit(session.run, trials, table, {item.id: item})
    return [found[id(t)] for t in trials]


def gold(session: Session) -> list[str]:
    item = session.run.task.train[0]
    labels = session.run.task.labels(item.questions)
    return [labels[q.id][0] for q in item.questions]


def test_a_line_is_credited_with_what_it_states(session: Session) -> None:
    first, second, _ = gold(session)
    lines = [
        [f" Where? Answer: {first}", f"Question: Which? Answer: {second}", "nothing at all"],
        ["nothing", f"It is {second}.", ""],
    ]
    assert credits(session, lines, [[1, 0, 0], [0, 1, 1]]) == [(0.5, -0.5, 0.0), (0.0, 0.5, 0.0)]


def test_stating_the_answer_in_the_question_is_not_answering(session: Session) -> None:
    first = gold(session)[0]
    assert credits(session, [[f"Question: Is it {first}? Answer: unknown"], ["x"]], [[1, 0, 0], [0, 0, 0]]) == [(0.0,), (0.0,)]


@given(st.lists(st.tuples(st.sampled_from("gh"), st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=3, max_size=3)), min_size=1, max_size=6))
def test_advantages_sum_to_zero_within_a_group(laws: Session, rows: list[tuple[str, list[float]]]) -> None:
    """Every trial states every answer, one per line: the credits of a question's lines sum to 0 over the group."""
    answers = gold(laws)
    groups = [g for g, _ in rows]
    found = credits(laws, [answers] * len(rows), [v for _, v in rows], groups)
    for group in set(groups):
        members = [c for c, g in zip(found, groups, strict=True) if g == group]
        assert [sum(column) for column in zip(*members, strict=True)] == pytest.approx([0.0] * 3, abs=1e-9)
        if len(members) == 1:
            assert members[0] == (0.0, 0.0, 0.0), "one alone has no advantage"


@pytest.fixture(scope="module")
def laws(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """One session for all examples of a property."""
    from selfimprove.models import Lora
    from selfimprove_seal import ClosedBook, ReSTEM

    lora: dict[str, Any] = {"rank": 2, "alpha": 4, "targets": ["q_proj"], "learning_rate": 1.0, "epochs": 2}
    editor = SelfEdits(inner=InnerLoop(lora, question="Question: {question} Answer:"), contexts=2, edits=2)
    updater = ReSTEM(Lora(1, 1, ("q_proj",), 1.0, 1, merge=True))
    return toy_session(tmp_path_factory.mktemp("laws"), editor=editor, rewarder=Accuracy(), updater=updater, evaluator=ClosedBook())


@given(st.lists(st.text(max_size=40), max_size=4))
def test_any_lines_have_finite_credit(laws: Session, lines: list[str]) -> None:
    [found] = credits(laws, [lines], [[1.0, 0.0, 1.0]])
    assert found == (0.0,) * len(lines)


# ---- closed book ----


@pytest.mark.parametrize("editor", [SelfEdits, ToolEdits])
def test_no_answer_is_asked_with_the_passage_in_sight(tmp_path: Path, roles: Make, make_inner: Make, recorder: Make, editor: type) -> None:
    """Rewards and evaluations ask greedily or score; no such prompt holds a sentence of a passage, or an answer."""
    task = ToyTask()
    engine = recorder(facts=task.facts)
    made = editor(inner=make_inner(), contexts=2, edits=2, max_tokens=64)
    from selfimprove.compose import WeightedSum

    rewarder = WeightedSum([Accuracy(), LogLikelihood()], [1.0, 0.02])
    toy_session(tmp_path, rounds=2, task=task, engine=engine, **roles(editor=made, rewarder=rewarder)).improve()
    passages = [s for split in ("train", "validation") for i in task.items(split) for s in sentences(i.context)]  # type: ignore[arg-type]
    answers = {a for split in ("train", "validation") for accepted in task.answers(split).values() for a in accepted}  # type: ignore[arg-type]
    asked = [r.prompt for r in engine.generated if r.temperature == 0] + [r.prompt for r in engine.scored]
    assert len(asked) >= 18
    for prompt in asked:
        assert not any(s in prompt for s in passages)
        assert not any(a in prompt for a in answers)
    shown = [r.prompt for r in engine.generated if r.temperature > 0]
    assert any(s in p for p in shown for s in passages), "only writing sees a passage"
    assert not any(a in p for p in shown for a in answers if not any(a in s and s in p for s in passages))


def test_the_papers_question_is_asked_to_the_letter(tmp_path: Path, recorder: Make, make_inner: Make, roles: Make) -> None:
    task = ToyTask()
    engine = recorder(facts=task.facts)
    paper = make_inner(question=InnerLoop.__dataclass_fields__["question"].default)
    session = toy_session(tmp_path, task=task, engine=engine, **roles(editor=SelfEdits(inner=paper)))
    item = session.run.task.train[0]
    paper.accuracy(session.run, [(session.run.models.root, item)])
    question = item.questions[0].text
    assert f"Let's answer a question directly and concisely.\nQuestion: Topic: {item.title}\n{question}\nAnswer:\n" in {
        r.prompt for r in engine.generated
    }


def test_an_item_without_a_context_has_no_edit(tmp_path: Path, roles: Make, make_inner: Make) -> None:
    """A bare question is an item too; a prompt per sentence has nothing to ask about it."""

    class Bare(ToyTask):
        def items(self, split: Any) -> Sequence[Item]:
            return [Item(i.id, i.title, "", i.questions) for i in super().items(split)]

    for name in ("few_shot", "implications"):
        editor = SelfEdits(inner=make_inner(), contexts=2, edits=2, prompt_name=name, max_tokens=1)
        lineage = toy_session(tmp_path / name, task=Bare(), **roles(editor=editor)).improve()
        assert len(lineage) == 2
        if name == "few_shot":
            assert all(t.error == "the edit is empty" for t in lineage.round(0).trials)
