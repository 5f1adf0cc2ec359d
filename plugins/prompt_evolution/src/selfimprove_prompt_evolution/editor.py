"""The model rewrites its own instruction from its failures (GEPA, algorithm 1), shown the best instructions so far (OPRO, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from selfimprove import Candidate, Edit, Lineage, Run, Trial, hookimpl, payload
from selfimprove.errors import ConfigError
from selfimprove.models import Generate
from selfimprove.payloads import Text
from selfimprove.rollouts import Asking, Reply, fill, instruction_of, replies


@payload("instruction")
@dataclass(frozen=True, slots=True)
class Instruction(Text):
    """An instruction that a model wrote for itself."""

    before: Mapping[str, float] = field(default_factory=dict)
    """The parent's grade on every question of its minibatch, by id; the instruction is rewarded on the same questions."""


@dataclass
class Reflection:
    """`edits` instructions per parent, written by the model from the parent's failures on a minibatch of training questions.

    Args:
        start: the instruction that a run begins with.
        reflection: what asks for a better one, with ``{instruction}``, ``{failures}`` and ``{history}``; the first line of its answer counts.
        asking: how a question is asked, as a mapping of `Asking`'s arguments; its template has ``{instruction}`` too.
        minibatch, edits: training questions per round, instructions per parent.
        shown: so many failures, and so many of the best instructions so far with their scores, are shown.
        max_tokens, temperature: of an instruction.
    """

    start: str
    reflection: str
    asking: Asking
    minibatch: int = 8
    edits: int = 4
    shown: int = 3
    max_tokens: int = 32
    temperature: float = 0.7

    produces = (Instruction,)
    needs = ("policy", "prompt")
    uses_labels = True

    def __post_init__(self) -> None:
        self.asking = Asking.of(self.asking)
        if "{instruction}" not in self.asking.template or "{failures}" not in self.reflection:
            raise ConfigError("editor.asking.template needs the field {instruction}, and editor.reflection the field {failures}")
        if min(self.minibatch, self.edits, self.shown) < 1:
            raise ConfigError("editor wants minibatch, edits and shown of at least 1")

    @hookimpl
    def prepare(self, root: Candidate, run: Run) -> Candidate:
        return Candidate.root(**root.parts, prompt=run.blobs.write("text", self.start))

    @hookimpl
    def propose(self, parents: Sequence[Candidate], lineage: Lineage, run: Run) -> Sequence[Edit]:
        batch = run.in_turn("questions", [(i, q) for i in run.task.train for q in i.questions], self.minibatch, len(lineage))
        rows = replies(run, [(p, batch) for p in parents])
        return [edit for p, row in zip(parents, rows, strict=True) for edit in self.rewritten(p, row, lineage, run)]

    def rewritten(self, parent: Candidate, answers: Sequence[Reply], lineage: Lineage, run: Run) -> list[Edit]:
        """What a parent writes after its failures; nothing where it has none. An instruction that is empty or known is no edit."""
        failures = [f"Question: {a.question.text}\nAnswer: {a.text}\nRight answer: {a.gold}" for a in answers if a.grade < 1]
        known = sorted((lineage.score(c.id) or 0.0, instruction_of(run, c)) for c in lineage)
        history = "\n".join(f"{score:.2f}: {text}" for score, text in known[-self.shown :])
        prompt = fill(self.reflection, instruction=instruction_of(run, parent), failures="\n".join(failures[: self.shown]), history=history)
        seeds = [run.seed_for("propose", len(lineage), parent.id, k) for k in range(self.edits if failures else 0)]
        requests = [Generate(parent.parts["policy"], prompt, self.max_tokens, self.temperature, seed=s, stop=("\n",)) for s in seeds]
        texts = dict.fromkeys(c.text.strip() for c in run.models.generate(requests))
        before = {a.question.id: a.grade for a in answers}
        return [Edit((parent.id,), Instruction(t, prompt, before=before), parent.id) for t in texts if t not in ("", *(k for _, k in known))]

    @hookimpl
    def apply(self, edits: Sequence[Edit], lineage: Lineage, run: Run) -> Sequence[Trial]:
        prompts = [run.blobs.write("text", e.payload.text) for e in edits]
        return [Trial(e, lineage[e.parents[0]].derive(len(lineage), i, prompt=p)) for i, (e, p) in enumerate(zip(edits, prompts, strict=True))]
