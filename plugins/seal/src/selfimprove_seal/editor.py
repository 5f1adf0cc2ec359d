"""Editors: a policy writes self-edits for contexts, and each edit makes the trial that its inner loop trains."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from selfimprove import Candidate, Edit, Item, Lineage, Run, Trial, hookimpl, payload
from selfimprove.errors import AdmissionError, ConfigError
from selfimprove.models import Completion, Document, Generate
from selfimprove.payloads import Text
from selfimprove.records import Part
from selfimprove_seal.inner import InnerLoop
from selfimprove_seal.prompts import edit_prompt


@payload("self_edit")
@dataclass(frozen=True, slots=True)
class SelfEdit(Text):
    """An edit, and the prompts and completions that wrote it: what ReST-EM trains on."""

    turns: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "turns", tuple((p, c) for p, c in self.turns))


@dataclass(frozen=True, slots=True)
class Lesson:
    """What an edit trains a policy on."""

    documents: tuple[Document, ...]
    settings: tuple[tuple[str, Any], ...] = ()
    """Fields of the inner loop's `Lora` that the edit replaces."""


Job = tuple[Part, Item, SelfEdit]
"""A policy, and the edit that it shall learn from, about an item."""


@dataclass
class ContextEditor(abc.ABC):
    """What the two forms of self-edit share: K edits per context (the group), one trial per edit and replicate.

    Args:
        inner: the inner loop's settings, as a mapping of `InnerLoop`'s arguments.
        contexts: contexts per round, taken in turn from the shuffled training split; 0 takes all of it every round.
        edits: edits per context (K).
        temperature, top_p, max_tokens: how edits are sampled.
    """

    inner: InnerLoop
    contexts: int = 20
    edits: int = 5
    temperature: float = 1.0
    top_p: float = 0.95
    max_tokens: int = 256
    stop: tuple[str, ...] = field(default=(), init=False)
    opening: str = field(default="", init=False)

    produces = (SelfEdit,)
    needs = ("policy",)

    def __post_init__(self) -> None:
        if isinstance(self.inner, Mapping):
            self.inner = InnerLoop(**self.inner)
        if self.contexts < 0 or self.edits < 1:
            raise ConfigError(f"editor wants contexts >= 0 and edits >= 1; got {self.contexts} and {self.edits}")
        Generate(Part("model", ""), "", self.max_tokens, self.temperature, self.top_p)  # it refuses what cannot be sampled, before anything runs

    def check_roles(self, roles: Mapping[str, Any]) -> None:
        """Raises: AdmissionError, where trials become parents whose adapter the inner loop cannot train on top of."""
        updater = roles.get("updater")
        if getattr(updater, "keeps_trials", False) and not self.inner.settings().merge:
            raise AdmissionError(
                f"{type(updater).__name__} (updater) keeps trials as they are, and the inner loop cannot train on top of their adapters; "
                "add +editor.inner.lora.merge=true, or choose another updater"
            )

    @abc.abstractmethod
    def prompts(self, item: Item) -> list[str]:
        """The texts that ask a policy for an edit; one, or one per piece of the edit."""

    @abc.abstractmethod
    def lessons(self, run: Run, jobs: Sequence[Job]) -> list[Lesson | str]:
        """What each job's edit trains on, or why it trains on nothing."""

    def adapt(self, run: Run, jobs: Sequence[Job], seeds: Sequence[int]) -> list[Part | str]:
        """The adapted policy of each job, or why its edit makes none."""
        lessons = self.lessons(run, jobs)
        results: list[Part | str] = [x if isinstance(x, str) else "" for x in lessons]
        chosen = [(n, jobs[n][0], x) for n, x in enumerate(lessons) if isinstance(x, Lesson)]
        taught = self.teach(run, [(policy, x) for _, policy, x in chosen], [seeds[n] for n, _, _ in chosen])
        for (n, _, _), part in zip(chosen, taught, strict=True):
            results[n] = part
        return results

    def teach(self, run: Run, lessons: Sequence[tuple[Part, Lesson]], seeds: Sequence[int]) -> list[Part]:
        """Each policy after its lesson. Lessons with the same settings train together."""
        taught: dict[int, Part] = {}
        for settings in dict.fromkeys(x.settings for _, x in lessons):
            group = [n for n, (_, x) in enumerate(lessons) if x.settings == settings]
            jobs = [(lessons[n][0], lessons[n][1].documents) for n in group]
            taught.update(zip(group, self.inner.train(run, jobs, [seeds[n] for n in group], **dict(settings)), strict=True))
        return [taught[n] for n in range(len(lessons))]

    @hookimpl
    def prepare(self, run: Run) -> None:
        if not run.task.train:
            raise ConfigError("SEAL writes edits about training contexts, and the task has none; raise task.train")

    @hookimpl
    def propose(self, parents: Sequence[Candidate], lineage: Lineage, run: Run) -> Sequence[Edit]:
        items = self.round_items(run, len(lineage))
        found = []
        for parent in parents:
            texts = self.write(run, parent.parts["policy"], items, self.edits, "propose", len(lineage), parent.id)
            found += [Edit((parent.id,), t, group=f"{parent.id}/{t.item}") for t in texts]
        return found

    @hookimpl
    def apply(self, edits: Sequence[Edit], lineage: Lineage, run: Run) -> Sequence[Trial]:
        items = {i.id: i for i in run.task.train}
        places = [(e, r) for e in edits for r in range(self.inner.replicates)]
        jobs = [(lineage[e.parents[0]].parts["policy"], items[e.payload.item], e.payload) for e, _ in places]
        seeds = [run.seed_for("apply", len(lineage), i) for i in range(len(places))]
        trials = []
        for i, ((edit, replicate), part) in enumerate(zip(places, self.adapt(run, jobs, seeds), strict=True)):
            parent = lineage[edit.parents[0]]
            if isinstance(part, Part):
                trials.append(Trial(edit, parent.derive(len(lineage), i, policy=part), replicate))
            else:
                trials.append(Trial(edit, parent.derive(len(lineage), i), replicate, error=part))
        return trials

    def round_items(self, run: Run, number: int) -> list[Item]:
        """The contexts of a round: the training split in one shuffled order, the next `contexts` of it each round."""
        return run.in_turn("contexts", run.task.train, self.contexts, number)

    def write(self, run: Run, policy: Part, items: Sequence[Item], count: int, *stream: str | int) -> list[SelfEdit]:
        """`count` edits per item, item after item."""
        jobs = [(i, k, n, prompt) for i in items for k in range(count) for n, prompt in enumerate(self.prompts(i))]
        requests = [
            Generate(policy, prompt, self.max_tokens, self.temperature, self.top_p, run.seed_for(*stream, i.id, k, n), self.stop)
            for i, k, n, prompt in jobs
        ]
        turns: dict[tuple[str, int], list[tuple[str, str]]] = {(i.id, k): [] for i in items for k in range(count)}
        for (item, k, _, prompt), completion in zip(jobs, run.models.generate(requests), strict=True):
            turns[item.id, k].append((prompt, self.text(completion)))
        return [
            SelfEdit("\n".join((self.opening + a).strip() for _, a in pieces if a.strip()), pieces[0][0] if pieces else "", item, tuple(pieces))
            for (item, _), pieces in turns.items()
        ]

    def text(self, completion: Completion) -> str:
        """The completion, without a last line that was cut."""
        if not completion.finished and "\n" in completion.text:
            return completion.text[: completion.text.rindex("\n")]
        return completion.text

    def expected(self, run: Run) -> dict[str, float]:
        """Rough tokens of one round, for `selfimprove plan`: its edits, their inner loops and the answers that are rewarded."""
        return self.cost(self.round_items(run, 0), self.edits, self.inner.replicates)

    def cost(self, items: Sequence[Item], edits: int, replicates: int) -> dict[str, float]:
        """Rough tokens of `edits` edits per item, of `replicates` inner loops for each, and of asking what each has taught."""
        written = 0.6 * self.max_tokens  # of an answer to a prompt: most end before the limit
        lines = sum(len(self.prompts(i)) for i in items) * edits * written
        asked = sum(len(i.questions) for i in items) * edits * replicates * min(8, self.inner.answer_tokens)
        passages = 1.5 * sum(len(i.context.split()) for i in items) * edits if self.inner.passage else 0
        return {"generated_tokens": lines + asked, "trained_tokens": (passages + lines) * replicates * self.inner.settings().epochs}


@dataclass
class SelfEdits(ContextEditor):
    """Knowledge incorporation (SEAL, section 3.1): an edit is text, and its lines are training documents.

    Args:
        prompt_name: one of `selfimprove_seal.prompts.PROMPTS`.
    """

    prompt_name: str = "implications"

    def __post_init__(self) -> None:
        super().__post_init__()
        template = edit_prompt(self.prompt_name)
        self.stop, self.opening = template.stop, template.opening

    def prompts(self, item: Item) -> list[str]:
        return edit_prompt(self.prompt_name)(item)

    def lessons(self, run: Run, jobs: Sequence[Job]) -> list[Lesson | str]:
        return [Lesson(d) if e.text.strip() and (d := self.inner.documents(i, e.text)) else "the edit is empty" for _, i, e in jobs]
