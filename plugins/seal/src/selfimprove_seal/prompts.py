"""Prompts: how a model is asked to write edits, and how it is asked what it knows.

The first five are the paper's (SEAL, arXiv 2506.10943, section 3.1 and appendix B); `few_shot` is ours, for models
too small to follow an instruction.
"""

from __future__ import annotations

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
    """A template with the fields ``title`` and ``context``, and the texts that end an edit."""

    template: str
    stop: tuple[str, ...] = ()
    opening: str = ""
    """What the prompt has already written of the edit; put back in front of the completion."""

    def __call__(self, item: Item) -> str:
        return self.template.replace("{title}", item.title).replace("{context}", item.context)


_SHOTS = (
    (
        "Oskar Vellin",
        "Oskar Vellin came into the world in Tarmouth in 1911. He was taught to bind books by his aunt, and he kept a tame "
        "heron called Brisk. For most of his career he worked at the Quay Museum, and he is remembered for a map of sunken bells.",
        (
            ("Where was Oskar Vellin born?", "Tarmouth"),
            ("In which year was Oskar Vellin born?", "1911"),
            ("What did Oskar Vellin learn from his aunt?", "to bind books"),
            ("What was the name of Oskar Vellin's heron?", "Brisk"),
            ("Where did Oskar Vellin work?", "the Quay Museum"),
            ("What is Oskar Vellin remembered for?", "a map of sunken bells"),
        ),
    ),
    (
        "Ilse Dorran",
        "Having grown up in Pellworth, Ilse Dorran moved to Saint Ambry to study glass under Joren Mott. She plays the hurdy-gurdy, "
        "married the diver Colm Asher, and won the Lantern Prize for 14 panels of blue glass.",
        (
            ("Where did Ilse Dorran grow up?", "Pellworth"),
            ("Which town did Ilse Dorran move to?", "Saint Ambry"),
            ("Who taught Ilse Dorran?", "Joren Mott"),
            ("Which instrument does Ilse Dorran play?", "the hurdy-gurdy"),
            ("Who did Ilse Dorran marry?", "Colm Asher"),
            ("Which prize did Ilse Dorran win?", "the Lantern Prize"),
            ("How many panels did Ilse Dorran make?", "14"),
        ),
    ),
)
"""Invented people, so that nothing in the shots can be an answer."""


def _few_shot() -> EditPrompt:
    shots = ""
    for _, context, pairs in _SHOTS:
        lines = "\n".join(f"Question: {q} Answer: {a}" for q, a in pairs)
        shots += f"Passage: {context}\nQuestions and answers about every fact in the passage:\n{lines}\n\n"
    template = shots + "Passage: {context}\nQuestions and answers about every fact in the passage:\nQuestion:"
    return EditPrompt(template, stop=("\n\n", "Passage:"), opening="Question:")


PROMPTS: dict[str, EditPrompt] = {
    "implications": EditPrompt(_IMPLICATIONS.replace("{length}", "a list") + _PASSAGE + "Implications:\n"),
    "implications_long": EditPrompt(_IMPLICATIONS.replace("{length}", "a long list") + _PASSAGE + "Implications:\n"),
    "implications_very_long": EditPrompt(_IMPLICATIONS.replace("{length}", "a very long list") + _PASSAGE + "Implications:\n"),
    "rewrite": EditPrompt(
        _REWRITE + "a few different ways, each one separated by a newline." + _PASSAGE + "Rewritten passages:\n"
    ),
    "self_qa": EditPrompt(_REWRITE + "a question-answer format." + _PASSAGE + "Question 1: ", opening="Question 1: "),
    "none": EditPrompt("{title}\n{context}\n\n"),
    "few_shot": _few_shot(),
}


def edit_prompt(name: str) -> EditPrompt:
    """The prompt of this name. Raises: ConfigError, with the names that exist."""
    if name not in PROMPTS:
        raise ConfigError(f"there is no edit prompt {name!r}; choose one of {', '.join(PROMPTS)}")
    return PROMPTS[name]
