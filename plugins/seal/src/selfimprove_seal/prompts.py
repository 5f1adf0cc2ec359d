"""Prompts: how a model is asked to write edits, and how it is asked what it knows.

The first five are the paper's (SEAL, arXiv 2506.10943, section 3.1 and appendix B); `few_shot` is ours, for models
too small to follow an instruction: a question and its answer for one sentence at a time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from selfimprove.errors import ConfigError
from selfimprove.task import Item

_PASSAGE = "\n\nPassage:\n{title}\n{context}\n\n"
_IMPLICATIONS = "Let's read the following passage and produce {length} of implications derived directly or indirectly from the content."
_REWRITE = "Let's read the following passage and rewrite it in "

QUESTION = "Let's answer a question directly and concisely.\nQuestion: Topic: {title}\n{question}\nAnswer:\n"
"""The paper's closed-book question (appendix B)."""
SHORT_QUESTION = "Question: {question}\nAnswer:"
"""The same for a small model: fewer tokens, and no line break before the answer."""


@dataclass(frozen=True, slots=True)
class EditPrompt:
    """A template with the fields ``title`` and ``context``, or ``title`` and ``sentence``; and the texts that end an edit.

    A template with ``{sentence}`` is asked once per sentence of the context, and the answers are the edit's lines.
    """

    template: str
    stop: tuple[str, ...] = ()
    opening: str = ""
    """What the prompt has already written of the edit; put back in front of the completion."""

    def __call__(self, item: Item) -> list[str]:
        """The prompts that an item's edit answers."""
        text = self.template.replace("{title}", item.title)
        if "{sentence}" in self.template:
            return [text.replace("{sentence}", s) for s in sentences(item.context)]
        return [text.replace("{context}", item.context)]


def sentences(text: str) -> list[str]:
    """The sentences of a text."""
    return [s for s in _SENTENCE_END.split(text.strip()) if s]


_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")

_SHOTS = (
    ("Oskar Vellin", "Oskar came into the world in Tarmouth.", "Where was Oskar Vellin born?", "Tarmouth"),
    ("Ilse Dorran", "Under Joren Mott she learned to cut glass.", "Who taught Ilse Dorran?", "Joren Mott"),
    ("Pavo Renn", "The Lantern Prize went to Renn in 1952.", "Which prize did Pavo Renn win?", "the Lantern Prize"),
    ("Tove Lindal", "A map of sunken bells made him famous.", "What is Tove Lindal remembered for?", "a map of sunken bells"),
)
"""Invented people, so that nothing in the shots can be an answer."""


def _few_shot() -> EditPrompt:
    shots = "".join(f"{title}: {sentence}\nQuestion: {question} Answer: {answer}\n\n" for title, sentence, question, answer in _SHOTS)
    return EditPrompt(shots + "{title}: {sentence}\nQuestion:", stop=("\n",), opening="Question:")


PROMPTS: dict[str, EditPrompt] = {
    "implications": EditPrompt(_IMPLICATIONS.replace("{length}", "a list") + _PASSAGE + "Implications:\n"),
    "implications_long": EditPrompt(_IMPLICATIONS.replace("{length}", "a long list") + _PASSAGE + "Implications:\n"),
    "implications_very_long": EditPrompt(_IMPLICATIONS.replace("{length}", "a very long list") + _PASSAGE + "Implications:\n"),
    "rewrite": EditPrompt(_REWRITE + "a few different ways, each one separated by a newline." + _PASSAGE + "Rewritten passages:\n"),
    "self_qa": EditPrompt(_REWRITE + "a question-answer format." + _PASSAGE + "Question 1: ", opening="Question 1: "),
    "none": EditPrompt("{title}\n{context}\n\n"),
    "few_shot": _few_shot(),
}


def edit_prompt(name: str) -> EditPrompt:
    """The prompt of this name. Raises: ConfigError, with the names that exist."""
    if name not in PROMPTS:
        raise ConfigError(f"there is no edit prompt {name!r}; choose one of {', '.join(PROMPTS)}")
    return PROMPTS[name]
