"""Documents of the inner loop: what an edit's text becomes, whatever the text is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove import Item
from selfimprove.errors import ConfigError
from selfimprove.models import Document
from selfimprove.task import Question
from selfimprove_seal.inner import InnerLoop, answer_of

LORA: dict[str, Any] = {"rank": 2, "alpha": 4, "targets": ["q_proj"], "learning_rate": 1e-3, "epochs": 10}
ITEM = Item("i", "Ada Vorn", "Ada keeps a heron. She was born in Brask.", (Question("i/0", "Where was Ada born?"),))
PAIRS = InnerLoop(LORA, question="Question: {question} Answer:", pairs="prompt")
TEXTS = InnerLoop(LORA)

MakeInner = Callable[..., InnerLoop]


def test_the_passage_and_every_line_with_the_title() -> None:
    """SEAL, appendix B."""
    found = TEXTS.documents(ITEM, "She has a bird.\n\n  Brask is her town.  \nShe has a bird.\n")
    assert found == (
        Document("Ada Vorn\nAda keeps a heron. She was born in Brask."),
        Document("Ada Vorn\nShe has a bird."),
        Document("Ada Vorn\nBrask is her town."),
    )


def test_without_the_passage() -> None:
    assert InnerLoop(LORA, passage=False).documents(ITEM, "One.") == (Document("Ada Vorn\nOne."),)
    assert InnerLoop(LORA, passage=False).documents(ITEM, "") == ()
    assert TEXTS.documents(Item("i", "Ada", "", ()), "One.") == (Document("Ada\nOne."),)


def test_pairs_as_texts_and_as_prompts() -> None:
    line = "Question: Where was Ada born? Answer: Brask"
    assert TEXTS.documents(ITEM, line)[1] == Document(f"Ada Vorn\n{line}")
    assert PAIRS.documents(ITEM, line)[1] == Document(" Brask", prompt="Question: Where was Ada born? Answer:")
    assert PAIRS.documents(ITEM, "She has a bird.")[1] == Document("Ada Vorn\nShe has a bird.")


@pytest.mark.parametrize(
    "line",
    [
        "Question: Where was Ada born? Answer: Brask",
        "Q: Where was Ada born? A: Brask",
        "1. Question 1: Where was Ada born?  Answer 1: Brask  ",
        "2) Q. Where was Ada born? A. Brask",
    ],
)
def test_ways_to_write_a_pair(line: str) -> None:
    assert PAIRS.line(ITEM, line) == Document(" Brask", prompt="Question: Where was Ada born? Answer:")
    assert answer_of(line) == "Brask"


@pytest.mark.parametrize("line", ["Question: ", "Question: what? Answer:", "Answer: Brask", "Questionable Answer: yes", "She asked: A: b"])
def test_lines_that_are_no_pair(line: str) -> None:
    document = PAIRS.line(ITEM, line)
    assert document is not None
    assert document.prompt == ""
    assert document.text == f"Ada Vorn\n{line.strip()}"


def test_the_answer_of_what_a_prompt_began() -> None:
    """The few-shot prompt has written `Question:` already; the turn holds the rest."""
    assert answer_of(" Where was Ada born? Answer: Brask") == "Brask"
    assert answer_of("no pair") == "no pair"


def test_an_answer_follows_the_prompt_as_it_is_scored() -> None:
    """After a line break nothing, after a colon a space: training and asking must not differ."""
    newline = InnerLoop(LORA, pairs="prompt")
    assert newline.pair(ITEM, "Where?", "Brask") == Document("Brask", prompt=newline.prompt(ITEM, "Where?"))
    assert newline.prompt(ITEM, "Where?").endswith("Question: Topic: Ada Vorn\nWhere?\nAnswer:\n")
    assert PAIRS.pair(ITEM, "Where?", "Brask").text == " Brask"


@pytest.mark.parametrize("edit", ["", "   ", "\n\n\t\n", "\r\n \x0b\n"])
def test_blank_edits_are_the_passage_alone(edit: str) -> None:
    assert TEXTS.documents(ITEM, edit) == TEXTS.documents(ITEM, "")


@given(st.text(max_size=300))
def test_any_text_makes_lawful_documents(edit: str) -> None:
    for inner in (TEXTS, PAIRS):
        found = inner.documents(ITEM, edit)
        assert found[0] == Document(f"{ITEM.title}\n{ITEM.context}"), "the passage comes first"
        assert len(set(found)) == len(found), "repeated lines are trained on once"
        assert len(found) <= 1 + len(edit.splitlines())
        for document in found[1:]:
            assert document.text.strip()
            if not document.prompt:
                title, _, line = document.text.partition("\n")
                assert title == ITEM.title
                assert line == line.strip() != ""
                assert len(line.splitlines()) == 1
        assert inner.documents(ITEM, edit + "\n" + edit) == found


@given(st.lists(st.text(st.characters(exclude_categories=("Cs", "Cc", "Z")), min_size=1, max_size=20), max_size=8))
def test_no_line_is_lost(lines: list[str]) -> None:
    found = {d.text for d in TEXTS.documents(ITEM, "\n".join(lines))}
    assert {f"Ada Vorn\n{line}" for line in lines} <= found


def test_a_huge_edit() -> None:
    assert len(TEXTS.documents(ITEM, "\n".join(f"line {i % 1000}" for i in range(100_000)))) == 1001
    one = TEXTS.documents(ITEM, "Question: " + "a: " * 100_000)
    assert len(one) == 2
    assert len(PAIRS.documents(ITEM, "Question: " + "a: " * 2_000)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": "What?"}, r"needs the field \{question\}"),
        ({"pairs": "json"}, "'text' or 'prompt'; got 'json'"),
        ({"replicates": 0}, "at least 1; got 0"),
        ({"lora": {**LORA, "ranks": 2}}, "inner.lora does not fit: .*its fields are rank, alpha"),
        ({"lora": {"rank": 2}}, "inner.lora does not fit"),
        ({"lora": {**LORA, "rank": 0}}, "rank >= 1"),
        ({"lora": {**LORA, "targets": "all-linear"}}, "got the text 'all-linear'"),
    ],
)
def test_settings_that_make_no_sense(make_inner: MakeInner, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_inner(**changes)


def test_an_edit_may_change_the_settings() -> None:
    assert TEXTS.settings(epochs=3, learning_rate=2e-3).epochs == 3
    with pytest.raises(ConfigError, match="does not fit"):
        TEXTS.settings(speed=3)
