"""The editor: an agent looks at one task that it failed, and proposes a change of its own folder, inside its own sandbox."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from selfimprove.code import CodeStore, PatchError
from selfimprove.errors import ConfigError
from selfimprove.hooks import hookimpl
from selfimprove.models import Generate, Score
from selfimprove.payloads import Patch
from selfimprove.records import Candidate, Edit, Lineage, Trial
from selfimprove.run import Run
from selfimprove.sandbox import Limits, Program, Refused
from selfimprove.tasks.program_repair import ProgramRepair
from selfimprove_dgm.genome import ENTRY, PART, child_of, donors, failed_items, initial

LIMITS = Limits(cpu_seconds=5, wall_seconds=60, memory_mib=256, processes=4, disk_mib=4, output_kib=64, requests=16)
_MACHINERY = "improve.py"
_TEXTS, _CHARACTERS = 200, 100_000


class SelfEdit:
    """One edit per parent, written by the parent's own `improve.py` after it has diagnosed one failed task.

    Args:
        form: ``grammar``, where the agent chooses among the changes it can think of, new operators coming from a donor pool; or
            ``free``, where it asks the model for a diff.
        ranking: who weighs the changes of the grammar: the ``model`` by the log-probability of each change's name after the diagnosis,
            or nobody (``uniform``).
        author: ``parent``, or ``root``: the initial agent's machinery edits every folder, which is DGM without self-modification.
        max_tokens: of a free diff.
    """

    produces = (Patch,)

    def __init__(
        self,
        form: Literal["grammar", "free"] = "grammar",
        ranking: Literal["model", "uniform"] = "model",
        author: Literal["parent", "root"] = "parent",
        max_tokens: int = 2048,
    ) -> None:
        if max_tokens < 1:
            raise ConfigError(f"editor.max_tokens is at least 1; got {max_tokens}")
        self.form, self.ranking, self.author, self.max_tokens = form, ranking, author, max_tokens

    @hookimpl
    def prepare(self, root: Candidate, run: Run) -> Candidate:
        if run.task.name != ProgramRepair.name:
            raise ConfigError(
                f"agents repair the functions of task=program_repair, and this is task={run.task.name}; choose that one, or another editor"
            )
        run.sandbox.require()
        return Candidate.root(**root.parts, **{PART: CodeStore(run.folder).put(initial())})

    @hookimpl
    def propose(self, parents: Sequence[Candidate], lineage: Lineage, run: Run) -> Sequence[Edit]:
        edits = []
        for i, parent in enumerate(parents):
            edits.append(Edit((parent.id,), self._patch(parent, i, lineage, run)))
            run.advance(i + 1, len(parents))
        return edits

    @hookimpl
    def apply(self, edits: Sequence[Edit], lineage: Lineage, run: Run) -> Sequence[Trial]:
        store = CodeStore(run.folder)
        trials = []
        for i, edit in enumerate(edits):
            parent = lineage[edit.parents[0]]
            try:
                part = store.put(child_of(store.get(parent.parts[PART]), edit.payload.text))
                trials.append(Trial(edit, parent.derive(len(lineage), i, **{PART: part})))
            except PatchError as e:
                trials.append(Trial(edit, parent.derive(len(lineage), i), error=str(e)))
        return trials

    def _patch(self, parent: Candidate, number: int, lineage: Lineage, run: Run) -> Patch:
        store = CodeStore(run.folder)
        tree = store.get(parent.parts[PART])
        known = {item.id: item for item in run.task.train}
        chance = run.rng("propose", len(lineage), number)
        failed = [i for i in failed_items(lineage, parent.id) if i in known] or list(known)
        item = known[failed[int(chance.integers(len(failed)))]]
        job: dict[str, Any] = {
            "mode": "improve",
            "task": {"id": item.id, "entry": item.title, "source": item.context},
            "donors": dict(donors()),
            "seed": run.seed_for("propose", len(lineage), number),
            "free_form": self.form == "free",
            "machinery": None,
        }
        author = parent
        if self.author == "root":
            author = lineage.root
            first = store.get(author.parts[PART])
            tree = {**tree, _MACHINERY: first[_MACHINERY]}
            job["machinery"] = json.loads(first["config.json"])
        asked = _Asked(self, parent, job["seed"], run)
        salt = [self.form, self.ranking, self.max_tokens, parent.parts["policy"].digest, run.models.engine.key]
        outcome = run.sandbox.run(Program(tree, ENTRY, job), asked.answer, LIMITS, salt)
        match outcome.answer:
            case {"diff": str(text), "name": str(name), "diagnosis": str(diagnosis)}:
                return Patch(text[:_CHARACTERS], item.id, diagnosis[:2000], name[:200], author.id)
        return Patch("", item.id, f"no proposal: {outcome.reason}", "", author.id)


@dataclasses.dataclass
class _Asked:
    """What the host answers an agent that edits itself: one score or one text of the parent's policy."""

    editor: SelfEdit
    parent: Candidate
    seed: int
    run: Run

    def answer(self, call: str, request: Mapping[str, Any]) -> Any:
        policy = self.parent.parts["policy"]
        match dict(request):
            case {"call": "score", "prompt": str(prompt), "texts": [*texts]} if (
                self.editor.ranking == "model"
                and len(prompt) <= 4000
                and 0 < len(texts) <= _TEXTS
                and all(isinstance(t, str) and len(t) <= 400 for t in texts)
            ):
                asked = [Score(policy, f"{prompt}\nThe best change is to", f" {t}") for t in texts]
                return [s.per_token for s in self.run.models.score(asked)]
            case {"call": "generate", "prompt": str(prompt)} if self.editor.form == "free" and len(prompt) <= _CHARACTERS:
                [written] = self.run.models.generate([Generate(policy, prompt, self.editor.max_tokens, temperature=0.7, seed=self.seed, chat=True)])
                return written.text
        raise Refused(f"no {call[:40]!r} of this form is answered here")
