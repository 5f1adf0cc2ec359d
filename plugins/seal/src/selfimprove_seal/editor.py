"""Editors: a policy writes self-edits for contexts, and each edit makes the trial that its inner loop trains."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from selfimprove import Candidate, Edit, Item, Lineage, Run, Trial, hookimpl
from selfimprove.models import Completion, Generate
from selfimprove.payloads import Text
from selfimprove.records import Part
from selfimprove_seal.inner import InnerLoop
from selfimprove_seal.prompts import edit_prompt


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

    produces = (Text,)
    needs = ("policy",)

    def __post_init__(self) -> None:
        if isinstance(self.inner, Mapping):
            self.inner = InnerLoop(**self.inner)

    @abc.abstractmethod
    def prompt(self, item: Item) -> str:
        """The text that asks a policy for an edit."""

    @abc.abstractmethod
    def adapt(self, run: Run, jobs: Sequence[tuple[Part, Item, Text]], seeds: Sequence[int]) -> list[Part | str]:
        """The adapted policy of each job, or why its edit makes none."""

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
        order = run.rng("contexts").permutation(len(run.task.train)).tolist()
        count = min(self.contexts or len(order), len(order))
        return [run.task.train[order[(number * count + i) % len(order)]] for i in range(count)]

    def write(self, run: Run, policy: Part, items: Sequence[Item], count: int, *stream: str | int) -> list[Text]:
        """`count` edits per item, item after item. At count 1 and a `stream` of evaluation, what the policy is judged by."""
        requests = [
            Generate(policy, self.prompt(i), self.max_tokens, self.temperature, self.top_p, run.seed_for(*stream, i.id, k), self.stop)
            for i in items
            for k in range(count)
        ]
        owners = [i for i in items for _ in range(count)]
        return [
            Text(self.text(completion), request.prompt, item.id)
            for item, request, completion in zip(owners, requests, run.models.generate(requests), strict=True)
        ]

    def text(self, completion: Completion) -> str:
        """The edit: what the prompt had begun, and the completion without a last line that was cut."""
        text = self.opening + completion.text
        if not completion.finished and "\n" in text:
            text = text[: text.rindex("\n")]
        return text.strip()

    def expected(self, run: Run) -> dict[str, float]:
        """Rough tokens of one round, for `selfimprove plan`."""
        items = self.round_items(run, 0)
        trials = len(items) * self.edits * self.inner.replicates
        words = sum(len(i.context.split()) for i in items) / max(1, len(items))
        return {
            "generated_tokens": len(items) * self.edits * self.max_tokens * 0.6 + trials * sum(len(i.questions) for i in items) / len(items) * 8,
            "trained_tokens": trials * (words * 1.5 + self.max_tokens * 0.6) * self.inner.settings().epochs,
        }


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

    def prompt(self, item: Item) -> str:
        return edit_prompt(self.prompt_name)(item)

    def adapt(self, run: Run, jobs: Sequence[tuple[Part, Item, Text]], seeds: Sequence[int]) -> list[Part | str]:
        documents = [self.inner.documents(item, edit.text) if edit.text.strip(" :\n") else () for _, item, edit in jobs]
        policies = self.inner.train(run, [(p, d) for (p, _, _), d in zip(jobs, documents, strict=True)], seeds)
        return [p if d else "the edit is empty" for p, d in zip(policies, documents, strict=True)]
