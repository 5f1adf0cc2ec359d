"""Every template has its fields, and every item fits into it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove import Item
from selfimprove.errors import ConfigError
from selfimprove.testing import ToyTask
from selfimprove_seal.prompts import PROMPTS, QUESTION, SHORT_QUESTION, edit_prompt, sentences

PAPER = ("implications", "implications_long", "implications_very_long", "rewrite", "self_qa", "none")
ITEMS = [*ToyTask(3).items("train"), Item("x", "A {title} of {context}", "Braces {sentence} and {0}. 100 % {title}.", ()), Item("y", "", "", ())]


@pytest.mark.parametrize("name", PROMPTS)
def test_templates_have_their_fields_and_no_others(name: str) -> None:
    fields = set(re.findall(r"\{(.*?)\}", PROMPTS[name].template))
    assert fields in ({"title", "context"}, {"title", "sentence"})


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("item", ITEMS[:3], ids=lambda i: i.id)
def test_a_prompt_holds_its_item(name: str, item: Item) -> None:
    prompts = edit_prompt(name)(item)
    assert all(item.title in p for p in prompts)
    for s in sentences(item.context):
        assert any(s in p for p in prompts)
    assert not any(re.search(r"\{\w+\}", p) for p in prompts), "a field was not filled"


@pytest.mark.parametrize("name", PROMPTS)
def test_an_items_braces_stay_as_they_are(name: str) -> None:
    item = Item("x", "Ada {Vorn}", "Braces {0} and %s are words.", ())
    assert all("Ada {Vorn}" in p for p in edit_prompt(name)(item))
    assert any("Braces {0} and %s are words." in p for p in edit_prompt(name)(item))


def test_the_papers_prompts_to_the_letter() -> None:
    """SEAL, section 3.1 and appendix B."""
    item = Item("i", "T", "C.", ())
    read = "Let's read the following passage and "
    passage = "\n\nPassage:\nT\nC.\n\n"
    expected = {
        "implications": f"{read}produce a list of implications derived directly or indirectly from the content.{passage}Implications:\n",
        "implications_long": f"{read}produce a long list of implications derived directly or indirectly from the content.{passage}Implications:\n",
        "implications_very_long": (
            f"{read}produce a very long list of implications derived directly or indirectly from the content.{passage}Implications:\n"
        ),
        "rewrite": f"{read}rewrite it in a few different ways, each one separated by a newline.{passage}Rewritten passages:\n",
        "self_qa": f"{read}rewrite it in a question-answer format.{passage}Question 1: ",
    }
    assert {name: edit_prompt(name)(item) for name in expected} == {name: [text] for name, text in expected.items()}
    assert set(PAPER) == set(PROMPTS) - {"few_shot"}
    assert QUESTION == "Let's answer a question directly and concisely.\nQuestion: Topic: {title}\n{question}\nAnswer:\n"


def test_few_shot_asks_once_per_sentence() -> None:
    for item in ITEMS[:3]:
        prompts = edit_prompt("few_shot")(item)
        whole = sentences(item.context)
        assert len(prompts) == len(whole)
        assert all(p.endswith(f"{item.title}: {s}\nQuestion:") for p, s in zip(prompts, whole, strict=True))


@pytest.mark.parametrize("name", PROMPTS)
def test_what_a_prompt_has_begun_is_put_back(name: str) -> None:
    template = PROMPTS[name]
    assert template.template.endswith(template.opening)


def test_an_unknown_prompt_names_the_known() -> None:
    with pytest.raises(ConfigError, match="no edit prompt 'implication'; choose one of implications, "):
        edit_prompt("implication")


def test_closed_book_questions_hold_no_passage() -> None:
    for text in (QUESTION, SHORT_QUESTION):
        assert "{question}" in text
        assert "{context}" not in text


@given(st.text(max_size=200))
def test_sentences_are_all_of_the_text(text: str) -> None:
    parts = sentences(text)
    assert all(parts)
    assert "".join("".join(parts).split()) == "".join(text.split())


def test_sentences_end_where_sentences_end() -> None:
    assert sentences("Dr. no one. Ada v. Bela left! Why? 3 p.m. it was.") == ["Dr. no one.", "Ada v.", "Bela left!", "Why? 3 p.m. it was."]
    assert sentences("  ") == []
