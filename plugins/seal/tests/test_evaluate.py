"""The arms: what each trains, what each asks, and that the passage arm gets as much training as the edits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove.errors import ConfigError
from selfimprove.models import Document, Generate, Train
from selfimprove.session import Session
from selfimprove.task import Item, Question, Split
from selfimprove.testing import ScriptedEngine, ToyTask, toy_session
from selfimprove_seal import ClosedBook, SelfEdits, ToolCall, ToolEdits
from selfimprove_seal.evaluate import ARMS, _arm, repeated

Make = Callable[..., Any]


def made(tmp_path: Path, roles: Make, recorder: Make, **changes: Any) -> tuple[Session, Any]:
    task = changes.pop("task", None) or ToyTask(4)
    engine = changes.pop("engine", None) or recorder(facts=task.facts)
    return toy_session(tmp_path, task=task, engine=engine, **roles(**changes)), engine


def measured(session: Session, arm: str, **options: Any) -> dict[str, float]:
    evaluator = session.run.roles["evaluator"]
    with session.run.stage("evaluate", 1):
        found: dict[str, float] = evaluator.measure(session.run, arm, session.run.models.root, **options)
    return found


def mean(graded: dict[str, float]) -> float:
    return sum(graded.values()) / len(graded)


def test_arms_of_a_model_that_learns_what_it_reads(tmp_path: Path, roles: Make, recorder: Make) -> None:
    session, _ = made(tmp_path, roles, recorder)
    accuracy = {arm: mean(measured(session, arm)) for arm in ARMS}
    assert accuracy["untouched"] == 0.0
    assert accuracy["passage"] == accuracy["passage_equal_tokens"] == accuracy["gold"] == 1.0


def test_without_the_passage_only_the_edit_teaches(tmp_path: Path, roles: Make, recorder: Make, make_inner: Make) -> None:
    session, _ = made(tmp_path, roles, recorder, editor=SelfEdits(inner=make_inner(passage=False), contexts=2, edits=2, max_tokens=64))
    accuracy = {arm: mean(measured(session, arm)) for arm in ARMS}
    assert accuracy["passage"] == accuracy["untouched"] == 0.0
    assert 0.0 < accuracy["edits"] < 1.0
    assert 0.0 < accuracy["passage_equal_tokens"] < 1.0, "edits shorter than the passage are compared with its beginning"
    assert accuracy["gold"] == 1.0


@pytest.mark.parametrize("arm", ARMS)
def test_every_question_of_the_split_is_graded(tmp_path: Path, roles: Make, recorder: Make, arm: str) -> None:
    session, engine = made(tmp_path, roles, recorder, evaluator=ClosedBook(seeds=2))
    found = measured(session, arm)
    assert set(found) == {q.id for i in session.run.task.validation for q in i.questions}
    seeds = {t.seed for t in engine.trained}
    most = 0 if arm == "untouched" else 2 * len(session.run.task.validation)
    assert len(seeds) == most or (arm == "edits" and 0 < len(seeds) < most), "a void edit trains nothing, everything else once per seed"


@pytest.mark.parametrize("name", ["implications", "few_shot"])
@pytest.mark.parametrize("skill", [0, 5, 40])
def test_the_passage_gets_as_many_tokens_as_the_edit(tmp_path: Path, roles: Make, recorder: Make, make_inner: Make, name: str, skill: int) -> None:
    """`skill` repeats the edit, so that short and long ones are compared."""
    task = ToyTask(3)
    base = ScriptedEngine(facts=task.facts)

    def script(request: Generate, known: tuple[Document, ...]) -> str:
        if request.temperature == 0:
            return base._script(request, known)
        return "\n".join(f"line {request.seed % 97} {k} " + "x" * (k % 7) for k in range(skill))

    session, engine = made(
        tmp_path,
        roles,
        recorder,
        task=task,
        engine=recorder(script, facts=task.facts),
        editor=SelfEdits(inner=make_inner(), contexts=2, edits=2, prompt_name=name, max_tokens=900),
    )
    equal_to_the_edits(session, engine)


def test_the_passage_gets_as_many_tokens_as_a_tool_call(tmp_path: Path, roles: Make, recorder: Make, make_inner: Make) -> None:
    """A call trains on what its tools make, for the epochs it asks for: not on its JSON."""
    task = ToyTask(4)
    base = ScriptedEngine(facts=task.facts)
    calls = [
        ToolCall(("sentences", "cloze", "chat_turns"), 1e-3, 8),
        ToolCall((), 1e-4, 1),
        ToolCall(("sentences", "question_answers"), 2e-3, 4),
    ]

    def script(request: Generate, known: tuple[Document, ...]) -> str:
        if request.prompt.endswith("Configuration: {"):
            return calls[request.seed % 3].to_json()[1:]
        return base._script(request, known)

    editor = ToolEdits(inner=make_inner(), contexts=2, edits=2, max_tokens=64)
    session, engine = made(tmp_path, roles, recorder, task=task, engine=recorder(script, facts=task.facts), editor=editor)
    equal_to_the_edits(session, engine)


def equal_to_the_edits(session: Session, engine: Any) -> None:
    """Per item, to the nearest word in every epoch; the items have a seed each."""
    tokens = session.run.models.tokens
    measured(session, "edits")
    edits = {r.seed: r for r in engine.trained}
    engine.trained.clear()
    measured(session, "passage_equal_tokens")
    assert len(engine.trained) == len(session.run.task.validation)
    for request in engine.trained:
        if (edit := edits.get(request.seed)) is None:
            assert len(request.documents) == 1, "a void edit trains nothing; its passage is trained on once"
        else:
            assert abs(sum(tokens(request.documents)) - sum(tokens(edit.documents))) <= 1
            assert request.lora == edit.lora


WORD = st.text(st.characters(exclude_categories=("Cs", "Cc", "Z")), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return toy_session(tmp_path_factory.mktemp("session"))


@given(st.lists(WORD, min_size=1, max_size=30), st.sampled_from([" ", "\n", "  "]), st.integers(2, 400))
def test_a_repeated_passage_has_the_tokens_that_were_wanted(session: Session, words: list[str], between: str, wanted: int) -> None:
    """A word is a token here, and a document's end one more: no number is further away than that."""
    passage = Document(between.join(words))
    *whole, last = repeated(session.run, passage, wanted)
    assert abs(sum(session.run.models.tokens([*whole, last])) - wanted) <= 1
    assert set(whole) <= {passage}, "whole repetitions"
    assert passage.text.startswith(last.text), "and the beginning of one"
    assert not passage.text[len(last.text) :][:1].strip(), "that ends with a word"


def test_a_passage_without_words_is_repeated_too(session: Session) -> None:
    assert repeated(session.run, Document("\n"), 7) == (Document("\n"),) * 7


def test_equal_tokens_to_another_writers_edits(tmp_path: Path, roles: Make, recorder: Make) -> None:
    session, engine = made(tmp_path, roles, recorder)
    inner = session.run.roles["editor"].inner
    [trained] = session.run.models.train([Train(session.run.models.root, (Document("x", prompt="y"),), inner.settings(merge=True))])
    engine.generated.clear()
    engine.trained.clear()
    measured(session, "passage_equal_tokens", writer=trained.policy)
    assert {r.policy for r in engine.generated if r.temperature > 0} == {trained.policy}
    assert {r.policy for r in engine.trained} == {session.run.models.root}


def test_the_gold_pairs_are_trained_as_the_model_is_asked(tmp_path: Path, roles: Make, recorder: Make, make_inner: Make) -> None:
    editor = SelfEdits(inner=make_inner(pairs="prompt"), contexts=2, edits=2)
    session, engine = made(tmp_path, roles, recorder, editor=editor)
    measured(session, "gold")
    gold = session.run.task.labels(q for i in session.run.task.validation for q in i.questions)
    trained = {(d.prompt, d.text) for r in engine.trained for d in r.documents if d.prompt}
    asked = {r.prompt for r in engine.generated}
    for item in session.run.task.validation:
        for q in item.questions:
            prompt = editor.inner.prompt(item, q.text)
            assert prompt in asked
            assert (prompt, f" {gold[q.id][0]}") in trained


def test_only_the_root_has_arms_and_it_is_measured_once(tmp_path: Path, roles: Make, recorder: Make) -> None:
    session, _ = made(tmp_path, roles, recorder)
    lineage = session.improve()
    first = dict(lineage.round(0).scores)
    assert next(iter(first)) == lineage.root.id
    assert {f"arm/{a}" for a in ARMS} <= set(first[lineage.root.id].metrics)
    assert first[lineage.root.id].score == first[lineage.root.id].metrics["arm/edits"]
    assert lineage.root.id not in dict(lineage.round(1).scores)
    for i in range(2):
        for child in lineage.round(i).children:
            metrics = dict(lineage.round(i).scores)[child.id].metrics
            assert set(metrics) == {"arm/edits", "arm/edits/se", "arm/edits/n"}


def test_labels_are_charged(tmp_path: Path, roles: Make, recorder: Make) -> None:
    session, _ = made(tmp_path, roles, recorder)
    session.improve()
    questions = 3 * (2 + 4)  # two training contexts were used, four are evaluated
    assert session.run.ledger.totals["labels"] >= questions


@pytest.mark.parametrize(("missing", "message"), [("train", "raise task.train"), ("validation", "raise task.validation")])
def test_a_task_without_contexts_is_refused_before_the_first_round(tmp_path: Path, roles: Make, missing: str, message: str) -> None:
    class Lacking(ToyTask):
        def items(self, split: Split) -> Sequence[Item]:
            return [] if split == missing else super().items(split)

    with pytest.raises(ConfigError, match=message):
        toy_session(tmp_path, task=Lacking(), **roles())


def test_unknown_arms_are_named() -> None:
    with pytest.raises(ConfigError, match=r"evaluator\.arms knows untouched, .*; got oracle, random"):
        ClosedBook(arms=("gold", "random", "oracle"))


def test_a_measurement_needs_a_seed() -> None:
    with pytest.raises(ConfigError, match=r"evaluator\.seeds is at least 1; got 0"):
        ClosedBook(seeds=0)


# ---- the standard error ----


def items(sizes: list[int]) -> list[Item]:
    """Items with questions whose ids say nothing about their item."""
    numbers = iter(range(10_000))
    return [Item(f"i{n}", "", "", tuple(Question(f"q{next(numbers)}", "?") for _ in range(size))) for n, size in enumerate(sizes)]


def test_questions_of_one_context_are_one_cluster() -> None:
    """Copies of a question add no information: the error is that of the contexts."""
    one, six = items([1] * 50), items([6] * 50)
    chance = np.random.default_rng(0).integers(0, 2, 50).tolist()
    single = _arm("x", {q.id: float(c) for i, c in zip(one, chance, strict=True) for q in i.questions}, one)
    copied = _arm("x", {q.id: float(c) for i, c in zip(six, chance, strict=True) for q in i.questions}, six)
    assert copied["arm/x/se"] == pytest.approx(single["arm/x/se"])
    p = sum(chance) / 50
    assert single["arm/x/se"] == pytest.approx(math.sqrt(p * (1 - p) / 49))
    assert (single["arm/x/n"], copied["arm/x/n"]) == (50, 300)


def test_the_error_covers_the_truth() -> None:
    """Contexts of different size and level: the mean is within two standard errors about 95 times in 100."""
    chance = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        sizes = chance.integers(1, 8, 40).tolist()
        made = items(sizes)
        levels = chance.random(40)
        graded = {q.id: float(chance.random() < level) for i, level in zip(made, levels, strict=True) for q in i.questions}
        found = _arm("x", graded, made)
        hits += abs(found["arm/x"] - 0.5) <= 2 * found["arm/x/se"]
    assert 0.90 <= hits / 300 <= 0.99


def test_one_context_has_no_error_of_its_own() -> None:
    [one] = items([3])
    assert _arm("x", {q.id: 1.0 for q in one.questions}, [one])["arm/x/se"] == 0.0
