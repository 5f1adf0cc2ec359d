"""The model layer against what a user would otherwise write, and against the limit of the hardware; side by side, in one run.

    python benchmarks/inner_loop.py                       # everything, 3 repetitions
    python benchmarks/inner_loop.py --quick               # a stated sample of the work, within 5 minutes on two cores
    python benchmarks/inner_loop.py --only train generate --device cuda

The work: 16 self-edits about invented people, each of 6 to 12 documents of 15 to 120 tokens, 10 epochs of the paper's inner loop, then 7 questions
per edit. Ours and the peer alternate, after a small warm-up of each that does not count, and medians are compared. The peers (`_peers.py`) are

* train: TRL's `SFTTrainer` with PEFT, one edit after another, set-up included; and the published recipe, batch 1 padded to 2,048 tokens;
* generate: `model.generate` in one static left-padded batch per adapter, which runs until its longest row is done;
* score: one padded forward pass with all logits per adapter;
* round: all requests of one `strategy=seal` round, given to these peers.

A sample is less of the same work for each side. Rates are compared; what was extrapolated says so. The last line is one JSON object, null for what
was left out; seconds, tokens and the machine are in benchmarks/results/inner_loop.json.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # a trainer that reports its use is slower

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _machine import RESULTS, best_product, commit, describe, median, timed, useful_flops, versions, warn_if_busy, write
from _peers import RECIPE_WIDTH, Peers, recorded

from selfimprove import config, identity
from selfimprove.ledger import Ledger
from selfimprove.models import Generate, Models, Score, Train
from selfimprove.records import Part
from selfimprove.session import Session
from selfimprove.task import Item
from selfimprove.tasks.biographies import Biographies
from selfimprove_seal.inner import InnerLoop
from selfimprove_seal.prompts import edit_prompt, sentences

KEYS = ("train_x_trl", "train_x_seal_recipe", "train_of_roofline", "generate_x_hf", "score_x_naive", "round_x_reference")
PAPER, DEFAULT = "seal_paper", "seal"
"""Strategies whose inner loops are timed: the paper's is what the keys are about."""


@dataclass(frozen=True)
class Sizes:
    """How much of the work is done."""

    edits: int = 16
    documents: int = 12
    """The most documents of an edit."""
    epochs: int = 10
    """The most epochs."""
    peers: int = 16
    """Edits whose adapters the peers train, generate with and score with: each costs them the same."""
    recipe_steps: int = 3
    answer_tokens: tuple[int, int] = (8, 64)
    """The fewest and the most tokens of an answer."""
    continuations: int = 4
    """Continuations scored per question: the answer, and distractors."""
    contexts: int = 4
    """Contexts of the proposing part and of the whole round."""
    proposals: int = 4
    """Edits per context there."""
    repetitions: int = 3
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """For a part of the work, the time after the start from which on one repetition of whatever begins is enough."""


FULL = Sizes(peers=6)
QUICK = Sizes(16, 2, 3, 3, 1, (4, 16), 2, 1, 4, repetitions=3, seconds={"train": 45.0, "generate": 100.0, "score": 140.0, "round": 140.0})


@dataclass(frozen=True)
class SelfEdit:
    """An item, the text of an edit about it, and the answers to its questions."""

    item: Item
    text: str
    answers: tuple[str, ...]


def self_edits(count: int, tokens: Callable[[str], int]) -> list[SelfEdit]:
    """Edits about invented people: questions with answers, sentences, and runs of sentences; with the passage 6 to 12 documents."""
    task, found = Biographies(train=2 * count, validation=0, test=0, questions=7), []
    people = sorted(zip(task.items("train"), task.people("train"), strict=True), key=lambda p: tokens(f"{p[0].title}\n{p[0].context}") >= 120)
    for i, (item, person) in enumerate(people[:count]):
        facts = sentences(person.text)
        lines = [f"Question: {e.question} Answer: {e.answer}" for e in person.entries]
        lines += [*facts, *(f"{a} {b}" for a, b in zip(facts[::2], facts[1::2], strict=False)), " ".join(facts[:4]), " ".join(facts[3:])]
        lines = [line for line in lines if 15 <= tokens(f"{item.title}\n{line}") < 120]
        order = identity.rng(0, "inner_loop", i).permutation(len(lines))
        found.append(SelfEdit(item, "\n".join(lines[j] for j in order[: 5 + i % 7]), tuple(e.answer for e in person.entries)))
    return found


class Bench:
    """Ours and the peers on one machine, and the work that both do."""

    def __init__(self, model: str, device: str, threads: int, sizes: Sizes, dtype: str = "auto") -> None:
        self.sizes, self.begin, self.part = sizes, time.monotonic(), ""
        torch.set_num_threads(threads)
        self.options = ["model=hf", f"model.name={model}"]
        composed = config.compose(["strategy=seal", *self.options, f"engine.device={device}", f"engine.threads={threads}", f"engine.dtype={dtype}"])
        self.engine: Any = config.build(composed, only_measure=True).engine
        self.device, self.dtype = self.engine.device, self.engine.dtype
        self.peers = Peers(model, self.dtype, self.device, self.engine.root.digest)
        self.edits = self_edits(sizes.edits, lambda text: len(self.peers.encode(text)))
        self.loops = {n: InnerLoop(**config.compose([f"strategy={n}"]).values["editor"]["inner"]) for n in (PAPER, DEFAULT)}
        self.warm_up()

    def warm_up(self) -> None:
        """A little of everything on both sides, so that kernels and imports are not measured."""
        few = self.requests(PAPER, 2, 1, 1)
        if self.dtype == torch.bfloat16:
            self.peers.choose_precision(few[0])
        with tempfile.TemporaryDirectory() as folder:
            models = self.models(folder)
            policies = [t.policy for t in models.train(few)]
            self.peers.train(few, [p.digest for p in policies])
            self.peers.serve([p.digest for p in policies])
            for side in (models, self.peers):
                for temperature in (0.0, 0.8):
                    side.generate([Generate(p, "Question: Who? Answer:", 4, temperature, 0.95, stop=("\n",)) for p in policies])
                side.score([Score(p, "Question: Who? Answer:", " Nobody.") for p in policies])
        self.peers.serve(())

    def repetitions(self) -> Iterator[int]:
        for n in range(self.sizes.repetitions):
            if n == 0 or not self.late:
                yield n

    @property
    def late(self) -> bool:
        """Whether this part's time is up."""
        return time.monotonic() - self.begin > self.sizes.seconds.get(self.part, float("inf"))

    def requests(self, strategy: str, edits: int, documents: int, epochs: int) -> list[Train]:
        """What the first edits ask to be trained under a strategy's inner loop, with at most so many documents and epochs.

        The documents that are left differ from edit to edit, so that a sample's are as long as all.
        """
        inner, found = self.loops[strategy], []
        lora = inner.settings(epochs=min(epochs, inner.settings().epochs))
        for i, e in enumerate(self.edits[:edits]):
            whole = inner.documents(e.item, e.text)
            turn = i % len(whole)
            found.append(Train(self.engine.root, (*whole[turn:], *whole[:turn])[:documents], lora, i))
        return found

    def encoded(self, requests: Sequence[Train]) -> list[tuple[list[int], int]]:
        """The documents of all requests as tokens and where their loss begins, once for every epoch."""
        return [d for r in requests for d in map(self.peers.document, r.documents) for _ in range(r.lora.epochs)]

    def models(self, folder: str | Path, trained: Path | None = None) -> Models:
        """A model layer that has computed nothing, or only what was trained in another folder."""
        if trained is not None:
            shutil.copytree(trained, folder, dirs_exist_ok=True)
        return Models(self.engine, Path(folder), Ledger())


@dataclass
class Runs:
    """What was timed: seconds and amount (tokens, or continuations) of every repetition of either side."""

    ours: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    peer: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    @property
    def ratio(self) -> float:
        return rate(self.ours) / rate(self.peer)

    def raw(self, **more: Any) -> dict[str, Any]:
        found = {"ratio": self.ratio, "ours_per_second": rate(self.ours), "peer_per_second": rate(self.peer)}
        return {**found, **more, "ours_seconds_and_amount": self.ours, "peer_seconds_and_amount": self.peer}


def rate(runs: Sequence[tuple[float, float]]) -> float:
    """The median amount per second."""
    return median([amount / seconds for seconds, amount in runs])


Measured = tuple[dict[str, float], dict[str, Any]]


# ---- train ----


def train(bench: Bench) -> Measured:
    """The keys about training, and the raw numbers."""
    before = best_product(bench.dtype, bench.device)
    done = bench.requests(PAPER, bench.sizes.edits, bench.sizes.documents, bench.sizes.epochs)
    runs, paper = train_with_trl(bench, PAPER, done)
    after = best_product(bench.dtype, bench.device)
    flops = useful_flops(bench.peers.model, done[0].lora, bench.encoded(done))
    product = max(before["flops_per_second"], after["flops_per_second"])
    _, default = train_with_trl(bench, DEFAULT, bench.requests(DEFAULT, bench.sizes.edits, bench.sizes.documents, bench.sizes.epochs))

    longest, lora = max((d for r in done for d in r.documents), key=lambda d: len(d.text)), done[0].lora
    steps = [bench.peers.recipe_step(longest, lora) for _ in range(bench.sizes.recipe_steps)]
    whole = bench.encoded(bench.requests(PAPER, bench.sizes.edits, FULL.documents, FULL.epochs))
    recipe = sum(len(ids) for ids, _ in whole) / (median(steps) * len(whole))
    keys = {
        "train_x_trl": runs.ratio,
        "train_x_seal_recipe": rate(runs.ours) / recipe,
        "train_of_roofline": flops / median([s for s, _ in runs.ours]) / product,
    }
    return keys, {
        "paper": paper,
        "default_inner_loop": default,
        "recipe": {
            "tokens_per_second": recipe,
            "seconds_of_a_step": steps,
            "extrapolated": f"{len(steps)} steps of batch 1 padded to {RECIPE_WIDTH} tokens were timed; the work has {len(whole)}, all alike",
        },
        "roofline": {"useful_flops": flops, "dtype": str(bench.dtype), "dense_product_before": before, "dense_product_after": after},
    }


def train_with_trl(bench: Bench, strategy: str, done: Sequence[Train]) -> tuple[Runs, dict[str, Any]]:
    """Trained tokens per second of the edits in banks, and of some of them with TRL, as if it had trained the whole work."""
    whole = bench.requests(strategy, bench.sizes.edits, FULL.documents, FULL.epochs)
    lengths = [len(ids) for ids, _ in bench.encoded(whole)]
    total, sample = sum(lengths), done[: bench.sizes.peers]
    runs, costs = Runs(), []
    for _ in bench.repetitions():
        with tempfile.TemporaryDirectory() as folder:
            models = bench.models(folder)
            seconds, trained = timed(bench.device, lambda m=models: m.train(done))
        runs.ours.append((seconds, sum(t.tokens for t in trained)))
        costs.append(bench.peers.train(sample, [str(i) for i in range(len(sample))]))
        runs.peer.append((costs[-1].setup / len(sample) * len(whole) + costs[-1].steps / costs[-1].tokens * total, total))
    seen, trl = int(runs.ours[0][1]), costs[0].tokens
    return runs, runs.raw(
        peer_set_up_and_steps=[dataclasses.asdict(c) for c in costs],
        peer_autocast=bench.peers.autocast,
        lora=dataclasses.asdict(done[0].lora),
        documents_of_an_edit=sorted(len(r.documents) for r in whole),
        tokens_of_a_document=[min(lengths), sum(lengths) / len(lengths), max(lengths)],
        extrapolated=(seen, trl) != (total, total)
        and f"of {total} tokens ours trained {seen} and TRL {trl}, on {len(sample)} edits; TRL's set-up counts for every edit of the work",
    )


# ---- generate and score ----


def adapted(bench: Bench, folder: Path) -> list[Part]:
    """A policy for every edit, trained a little; the peers have the adapters of theirs loaded."""
    requests = [dataclasses.replace(r, documents=r.documents[-2:]) for r in bench.requests(PAPER, bench.sizes.edits, FULL.documents, 1)]
    models = bench.models(folder)
    policies = [t.policy for t in models.train(requests)]
    names = [p.digest for p in policies[: bench.sizes.peers]]
    bench.peers.adopt({n: models.adapter(n) for n in names}, requests[0].lora)
    bench.peers.serve(names)
    return policies


def compare(bench: Bench, call: str, requests: Sequence[Any], sample: Sequence[Any], trained: Path) -> tuple[Runs, list[Any], list[Any]]:
    """Runs of a call with all requests at once, and of the peers with a sample of them; and what both found last."""
    runs = Runs()
    for _ in bench.repetitions():
        with tempfile.TemporaryDirectory() as folder:
            models = bench.models(folder, trained)
            for policy in {r.policy for r in requests} - {models.root}:
                models.adapter(policy.digest)  # read from disk; the peers' are in memory too
            seconds, ours = timed(bench.device, lambda m=models: getattr(m, call)(requests))
        runs.ours.append((seconds, amount(ours)))
        seconds, peer = timed(bench.device, lambda: getattr(bench.peers, call)(sample))
        runs.peer.append((seconds, amount(peer)))
    return runs, ours, peer


def amount(found: Sequence[Any]) -> float:
    """Generated tokens; the number of scored continuations."""
    return sum(c.tokens for c in found) if hasattr(found[0], "text") else len(found)


def generate(bench: Bench) -> Measured:
    """Answers with an adapter per edit, then proposals by the root: tokens per second of each, and of both together."""
    with tempfile.TemporaryDirectory() as folder:
        policies = adapted(bench, Path(folder))
        inner, (fewest, most) = bench.loops[PAPER], bench.sizes.answer_tokens
        longest = identity.rng(0, "answers").integers(fewest, most + 1, size=(len(policies), 7))
        asked = [
            Generate(p, inner.prompt(e.item, q.text), int(n), temperature=0.0, stop=("\n",))
            for p, e, row in zip(policies, bench.edits, longest, strict=True)
            for q, n in zip(e.item.questions, row, strict=True)
        ]
        part = asked[: 7 * bench.sizes.peers]
        answers, ours, peer = compare(bench, "generate", asked, part, Path(folder))
        editor, prompt = config.compose([f"strategy={DEFAULT}"]).values["editor"], edit_prompt("few_shot")
        wanted = [
            Generate(
                bench.engine.root,
                text,
                editor["max_tokens"],
                editor["temperature"],
                editor["top_p"],
                identity.seed_for(0, e.item.id, k, n),
                prompt.stop,
            )
            for e in bench.edits[: bench.sizes.contexts]
            for k in range(bench.sizes.proposals)
            for n, text in enumerate(prompt(e.item))
        ]
        proposals, _, _ = compare(bench, "generate", wanted, wanted, Path(folder))
    scale = len(asked) / len(part)
    pairs = [
        zip(a, b, strict=False) for a, b in ((answers.ours, proposals.ours), ([(s * scale, n * scale) for s, n in answers.peer], proposals.peer))
    ]
    both = Runs(*([(s + t, n + m) for (s, n), (t, m) in pair] for pair in pairs))
    return {"generate_x_hf": both.ratio}, {
        "together": both.raw(extrapolated=scale > 1 and f"the peer's answers, from {len(part)} requests of {len(asked)}"),
        "answers": answers.raw(requests=len(asked), same_text=sum(a.text == b.text for a, b in zip(ours, peer, strict=False)) / len(peer)),
        "proposals": proposals.raw(requests=len(wanted)),
    }


def score(bench: Bench) -> Measured:
    """Continuations per second: every question's answer and distractors, under the adapter of its edit."""
    with tempfile.TemporaryDirectory() as folder:
        policies = adapted(bench, Path(folder))
        inner, answers = bench.loops[DEFAULT], [e.answers for e in bench.edits]
        asked = [
            Score(p, inner.prompt(e.item, q.text), f" {answers[(i + shift) % len(answers)][n]}")
            for i, (p, e) in enumerate(zip(policies, bench.edits, strict=True))
            for n, q in enumerate(e.item.questions)
            for shift in range(bench.sizes.continuations)
        ]
        part = asked[: len(asked) // len(policies) * bench.sizes.peers]
        runs, ours, peer = compare(bench, "score", asked, part, Path(folder))
    difference = max(abs(a.logprob - b.logprob) for a, b in zip(ours, peer, strict=False))
    extrapolated = len(part) < len(asked) and f"the peer, from {len(part)} continuations of {len(asked)}"
    return {"score_x_naive": runs.ratio}, runs.raw(continuations=len(asked), largest_difference_in_nats=difference, extrapolated=extrapolated)


# ---- the whole round ----


def whole_round(bench: Bench) -> Measured:
    """Seconds of one round of `strategy=seal` through its real roles, and of the peers doing everything that it asked for."""
    sizes, runs, spent = bench.sizes, Runs(), []
    proposals = max(2, sizes.proposals // 2) if bench.late else sizes.proposals  # a slow machine's sample is smaller
    options = [f"editor.contexts={sizes.contexts}", f"editor.edits={proposals}", f"task.train={sizes.contexts}", "task.questions=7"]
    options += [f"{lora}.epochs={min(sizes.epochs, default)}" for lora, default in (("editor.inner.lora", 4), ("updater.lora", 3))]
    fixed = ["evaluator=none", "updater=restem_edits", "engine=scripted", "task.validation=0", "task.test=0", "guard.rounds.rounds=1", "observer=[]"]
    for n in bench.repetitions():
        parts = config.build(config.compose(["strategy=seal", *fixed, *options, f"seed={n}"]))
        with tempfile.TemporaryDirectory() as folder:
            session = Session(dataclasses.replace(parts, engine=bench.engine), Path(folder))
            calls = recorded(session.run.models)
            seconds, lineage = timed(bench.device, session.improve)
        if lineage.size == 1:
            raise AssertionError("the round made no child")
        totals = session.run.ledger.totals
        runs.ours.append((seconds, 1))
        bench.peers.serve(())
        seconds, tokens = timed(bench.device, lambda c=calls: bench.peers.replay(c))
        runs.peer.append((seconds, 1))
        spent.append({"ours": {k: totals[k] for k in tokens}, "peer": tokens, "trials": sum(len(r.trials) for r in lineage.rounds)})
    return {"round_x_reference": runs.ratio}, runs.raw(tokens=spent, options=[*fixed, *options])


# ---- the command ----

PARTS: dict[str, Callable[[Bench], Measured]] = {"train": train, "generate": generate, "score": score, "round": whole_round}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a sample of the work")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some of the parts")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repetitions", type=int, default=None)
    parser.add_argument("--out", type=Path, default=RESULTS / "inner_loop.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # peft and trl use names that transformers has replaced
    load = warn_if_busy()
    sizes = QUICK if options.quick else FULL
    sizes = dataclasses.replace(sizes, repetitions=options.repetitions or sizes.repetitions)
    bench, began = Bench(options.model, options.device, options.threads, sizes, options.dtype), commit()
    about = {"sizes": dataclasses.asdict(bench.sizes), "engine": dict(bench.engine.key), "versions": versions()}
    before = measured_before(options.out, about) if options.only != list(PARTS) else {}
    keys: dict[str, float] = {k: v for k in KEYS if (v := before.get(k)) is not None}
    raw: dict[str, Any] = dict(before.get("parts", {}))
    for name in options.only:
        bench.part = name
        found, raw[name] = PARTS[name](bench)
        keys |= found
        print(f"{time.monotonic() - bench.begin:4.0f} s  {name}: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items()), flush=True)
        line = {k: round(keys[k], 3) if k in keys else None for k in KEYS}
        made = {
            **line,
            "how": [*before.get("how", []), " ".join(["python benchmarks/inner_loop.py", *sys.argv[1:]])],
            "parts": raw,
            **about,
            "machine": {**describe(bench.device), "load_average_at_the_start": load, "load_average_at_the_end": os.getloadavg()[0]},
            "commit": began,
            "seconds": time.monotonic() - bench.begin,
        }
        write(options.out, made)  # after every part, so that a later one's failure costs nothing of it
    print(json.dumps({**line, "details": {"quick": options.quick, "extrapolated": list(extrapolated(raw)), "seconds": round(made["seconds"])}}))


def measured_before(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The file that `--only` adds to, where it holds other parts of the same sizes, engine and versions; else nothing."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if all(found.get(k) == v for k, v in json.loads(json.dumps(about)).items()) else {}


def extrapolated(raw: dict[str, Any], at: str = "") -> Iterator[str]:
    """What was extrapolated, wherever it stands."""
    for key, value in raw.items():
        if key == "extrapolated" and value:
            yield f"{at}: {value}"
        elif isinstance(value, dict):
            yield from extrapolated(value, f"{at}.{key}" if at else key)


if __name__ == "__main__":
    main()
