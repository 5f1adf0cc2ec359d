"""Tool calls: parsed strictly, whatever a model writes; and the documents that they make."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove import Item
from selfimprove.models import Document
from selfimprove.models.api import Generate
from selfimprove.records import Part
from selfimprove.testing import ScriptedEngine, ToyTask, toy_session
from selfimprove_seal import InnerLoop, ToolCall, ToolEdits
from selfimprove_seal.editor import Lesson, SelfEdit
from selfimprove_seal.prompts import sentences
from selfimprove_seal.tools import _EXAMPLES, AUGMENTATIONS, EPOCHS, LEARNING_RATES, OPENING, PROMPT, cloze

Make = Callable[..., Any]
CALLS = st.builds(
    lambda chosen, rate, epochs: ToolCall(tuple(a for a in AUGMENTATIONS if a in chosen), rate, epochs),
    st.sets(st.sampled_from(AUGMENTATIONS)),
    st.sampled_from(LEARNING_RATES),
    st.sampled_from(EPOCHS),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*AUGMENTATIONS, "learning_rate", "epochs", "x"]), inner, max_size=7),
    max_leaves=12,
)
GOOD: dict[str, Any] = {**dict.fromkeys(AUGMENTATIONS, False), "sentences": True, "learning_rate": 1e-3, "epochs": 4}
ITEM = Item("i", "Oskar Vellin", "Oskar Vellin was born in Tarmouth in 1902. In Brask he met Ilse Dorran.", ())


@given(CALLS)
def test_what_is_written_is_read_back(call: ToolCall) -> None:
    assert ToolCall.parse(call.to_json()) == call
    assert ToolCall.parse(f"  {call.to_json()}\n") == call


@given(st.text())
def test_no_text_raises(text: str) -> None:
    assert isinstance(ToolCall.parse(text), str)
    assert isinstance(ToolCall.parse("{" + text), str | ToolCall)


@given(JSON)
def test_no_json_raises(data: Any) -> None:
    found = ToolCall.parse(json.dumps(data))
    assert isinstance(found, str | ToolCall)
    if isinstance(found, str):
        assert found, "it says why"


@given(st.fixed_dictionaries({**dict.fromkeys(AUGMENTATIONS, JSON), "learning_rate": JSON, "epochs": JSON}))
def test_only_the_listed_values_are_accepted(data: dict[str, Any]) -> None:
    found = ToolCall.parse(json.dumps(data))
    if isinstance(found, ToolCall):
        assert all(type(data[a]) is bool for a in AUGMENTATIONS)
        assert found.learning_rate in LEARNING_RATES
        assert found.epochs in EPOCHS
        assert type(data["learning_rate"]) is not bool
        assert type(data["epochs"]) is not bool


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 10_000, '{"sentences": ' + "9" * 10_000, "", "{", "null", "\x00", "\ud800"])
def test_monstrous_texts(text: str) -> None:
    reason = ToolCall.parse(text)
    assert isinstance(reason, str)
    assert len(reason) < 500, "a reason is for a table's cell"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sentences": 1}, "true or false"),
        ({"sentences": "true"}, "true or false"),
        ({"cloze": None}, "true or false"),
        ({"epochs": True}, "epochs is one of"),
        ({"epochs": 3}, "epochs is one of"),
        ({"epochs": -1}, "epochs is one of"),
        ({"epochs": "4"}, "epochs is one of"),
        ({"epochs": 1e999}, "epochs is one of"),
        ({"learning_rate": True}, "learning_rate is one of"),
        ({"learning_rate": float("nan")}, "learning_rate is one of"),
        ({"learning_rate": float("inf")}, "learning_rate is one of"),
        ({"learning_rate": 1.0}, "learning_rate is one of"),
        ({"learning_rate": [1e-3]}, "learning_rate is one of"),
        ({"batch": 4}, "missing or too many"),
    ],
)
def test_why_a_call_is_none(changes: dict[str, Any], reason: str) -> None:
    assert isinstance(ToolCall.parse(json.dumps(GOOD)), ToolCall)
    found = ToolCall.parse(json.dumps({**GOOD, **changes}))
    assert isinstance(found, str)
    assert reason in found


@pytest.mark.parametrize("missing", GOOD)
def test_a_missing_field_is_named(missing: str) -> None:
    found = ToolCall.parse(json.dumps({k: v for k, v in GOOD.items() if k != missing}))
    assert isinstance(found, str)
    assert missing in found


def test_the_shots_are_calls_and_cover_every_value() -> None:
    for shot in _EXAMPLES:
        assert ToolCall.parse(shot.to_json()) == shot
        assert shot.to_json() in PROMPT
    assert {a for s in _EXAMPLES for a in s.augmentations} == set(AUGMENTATIONS)
    assert {s.learning_rate for s in _EXAMPLES} == set(LEARNING_RATES)
    assert {s.epochs for s in _EXAMPLES} == set(EPOCHS)


# ---- documents ----


def tools(**changes: Any) -> ToolEdits:
    lora = {"rank": 2, "alpha": 4, "targets": ["q_proj"], "learning_rate": 1.0, "epochs": 2}
    inner = InnerLoop(lora, question="Question: {question} Answer:", answer_tokens=8, **changes)
    return ToolEdits(inner=inner, contexts=2, edits=2, max_tokens=64)


@given(CALLS)
def test_a_call_gets_what_it_asks_for_and_nothing_else(call: ToolCall) -> None:
    pairs = "Question: Where? Answer: Tarmouth"
    found = tools().documents(ITEM, call, pairs)
    assert found[0] == Document(f"{ITEM.title}\n{ITEM.context}")
    assert len(set(found)) == len(found)
    texts = [d.text for d in found]
    for s in sentences(ITEM.context):
        assert (f"{ITEM.title}\n{s}" in texts) == ("sentences" in call.augmentations)
    assert (f"{ITEM.title}\n{pairs}" in texts) == ("question_answers" in call.augmentations)
    assert any("____" in d.prompt for d in found) == ("cloze" in call.augmentations)
    assert any(d.chat for d in found) == ("chat_turns" in call.augmentations)


def test_a_call_for_nothing_without_the_passage_makes_nothing() -> None:
    assert tools(passage=False).documents(ITEM, ToolCall((), 1e-3, 1), "") == ()


def test_cloze_asks_for_names_and_numbers() -> None:
    first, second = sentences(ITEM.context)
    assert [d.text for d in cloze(ITEM, first)] == [" Tarmouth", " 1902"]
    assert [d.text for d in cloze(ITEM, second)] == [" Brask", " Ilse Dorran"]
    assert cloze(ITEM, first)[0].prompt == "Oskar Vellin\nFill in the blank: Oskar Vellin was born in ____ in 1902.\nAnswer:"


@pytest.mark.parametrize(
    ("title", "sentence"),
    [
        ("Oskar Vellin", "In Brask Oskar Vellin's father and Vellin met."),
        ("Vellin, Oskar (painter)", "In Brask Vellin met Oskar."),
        ("the Lantern Prize", "In Brask it was The Lantern Prize, or Prize."),
        ("Jean-Luc", "In Brask he was called Jean, and Luc, and Jean-Luc."),
    ],
)
def test_cloze_never_asks_for_the_title(title: str, sentence: str) -> None:
    assert [d.text for d in cloze(Item("i", title, sentence, ()), sentence)] in ([" Brask"], [])


@given(st.text(max_size=20), st.lists(st.sampled_from(["Ada", "Brask", "Ada's", "1902", "3,000", "saw", "and", "X.", "Ünal,"]), max_size=12))
def test_cloze_takes_one_span_out_of_the_sentence(title: str, words: list[str]) -> None:
    sentence = " ".join(words) + "."
    for document in cloze(Item("i", title, "", ()), sentence):
        blank = document.prompt.removeprefix(f"{title}\nFill in the blank: ").removesuffix("\nAnswer:")
        assert blank.replace("____", document.text.strip(), 1) == sentence
        assert not {w.casefold() for w in title.split()} & {w.casefold() for w in document.text.split()}


def test_pairs_are_asked_of_the_writer_once_per_policy_and_item(tmp_path: Path) -> None:
    session = toy_session(tmp_path, editor=tools(), **without_editor())
    item, root = session.run.task.train[0], session.run.models.root
    wanting = ToolCall(("question_answers",), 1e-3, 2).to_json()
    jobs = [(root, item, SelfEdit(wanting, "p", item.id, (("p", wanting[1:]),))) for _ in range(3)]
    editor = session.run.roles["editor"]
    lessons = editor.lessons(session.run, jobs)
    assert len(set(lessons)) == 1
    assert isinstance(lessons[0], Lesson)
    assert dict(lessons[0].settings) == {"learning_rate": 1e-3, "epochs": 2}
    generated = session.run.ledger.totals["generated_tokens"]
    editor.lessons(session.run, jobs)
    assert session.run.ledger.totals["generated_tokens"] == 2 * generated, "the second time it is charged as the first"


def without_editor() -> dict[str, Any]:
    from selfimprove.models import Lora
    from selfimprove_seal import Accuracy, ClosedBook, ReSTEM

    return {"rewarder": Accuracy(), "updater": ReSTEM(Lora(1, 1, ("q_proj",), 1.0, 1, merge=True)), "evaluator": ClosedBook()}


def test_an_invalid_call_is_data_through_a_whole_session(tmp_path: Path, recorder: Make) -> None:
    """Every second edit is a sentence instead of a call: no score, a reason, and the run goes on with the others."""
    task = ToyTask()
    base = ScriptedEngine(facts=task.facts)
    good = ToolCall(("sentences",), 2e-3, 4).to_json().removeprefix(OPENING)

    def script(request: Generate, known: tuple[Document, ...]) -> str:
        if request.prompt.endswith(f"Configuration: {OPENING}"):
            return good if request.seed % 2 else "I would read it twice."
        return base._script(request, known)

    engine = recorder(script, facts=task.facts)
    editor = tools()
    editor.edits = 8
    lineage = toy_session(tmp_path, rounds=2, task=task, engine=engine, editor=editor, **without_editor()).improve()
    assert len(lineage) == 2
    for i in range(2):
        r = lineage.round(i)
        assert len(r.trials) == 2 * 8
        kinds = {t.edit.payload.text for t in r.trials}
        assert kinds == {OPENING + good, f"{OPENING}I would read it twice."}
        for trial, reward in zip(r.trials, r.rewards, strict=True):
            if trial.edit.payload.text.endswith("twice."):
                assert reward.score is None
                assert reward.error is not None
                assert reward.error.startswith("not a JSON object")
                assert trial.candidate.parts == lineage[r.parents[0]].parts
            else:
                assert reward.score is not None
                assert trial.candidate.parts["policy"] != lineage[r.parents[0]].parts["policy"]
        [child] = r.children
        assert lineage.score(child.id) is not None
    assert {(t.lora.learning_rate, t.lora.epochs) for t in engine.trained} >= {(2e-3, 4), (1.0, 1)}


def test_only_invalid_calls_make_no_child_and_no_crash(tmp_path: Path) -> None:
    engine = ScriptedEngine(lambda request, known: "{", name="nonsense")
    lineage = toy_session(tmp_path, rounds=2, engine=engine, editor=tools(), **without_editor()).improve()
    assert len(lineage) == 2
    assert lineage.size == 1
    assert all(r.score is None for i in range(2) for r in lineage.round(i).rewards)


def test_jobs_with_other_settings_train_apart_and_come_back_in_order(tmp_path: Path) -> None:
    session = toy_session(tmp_path, editor=tools(), **without_editor())
    item, root = session.run.task.train[0], session.run.models.root
    calls = [ToolCall(("sentences",), rate, epochs).to_json() for rate in LEARNING_RATES[:2] for epochs in EPOCHS[:2]]
    texts = [calls[0], "broken", calls[1], calls[2], calls[0], calls[3]]
    jobs = [(root, item, SelfEdit(t, "p", item.id, (("p", t[1:]),))) for t in texts]
    parts = session.run.roles["editor"].adapt(session.run, jobs, list(range(len(jobs))))
    for text, part in zip(texts, parts, strict=True):
        call = ToolCall.parse(text)
        if isinstance(call, str):
            assert part == call
        else:
            assert isinstance(part, Part)
            lora = session.run.models.lora(part.digest)
            assert (lora.learning_rate, lora.epochs) == (call.learning_rate, call.epochs)
