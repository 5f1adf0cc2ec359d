"""What it takes for SEAL to work on a small model: the inner loop on gold pairs, what edits say, and one round of ReST-EM in two forms.

    python benchmarks/seal_exploration.py --people 24 engine.device=cuda

Everything is measured on validation people; the sealed test stays closed. Run it again after a kill: it finds its finished work under
--work. The result is benchmarks/results/seal_exploration.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _machine import arguments, commit, describe, versions
from seal_knowledge import summary

from selfimprove import config
from selfimprove.graders import Answer, Contains
from selfimprove.run import Run
from selfimprove.session import Session
from selfimprove.storage import write_json
from selfimprove_seal import InnerLoop, SelfEdits
from selfimprove_seal.inner import answer_of

LEARNING_RATES = {0: 1e-3, 15: 2e-3, 20: 3e-3}
"""By the first layer that has adapters: fewer layers stand, and want, larger steps."""
EPOCHS = (4, 5)
TEMPERATURES = (0.0, 0.5, 0.8)
PROMPTS = {"few_shot": 40, "implications": 256}
"""The most tokens of an answer, by prompt."""
UPDATERS = {"restem": "the best lines, by their credit", "restem_edits": "the best edit of each context"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=12, help="people of every measurement, and training contexts of the round of ReST-EM")
    parser.add_argument("--work", type=Path, default=Path("runs/seal_exploration"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "seal_exploration.json")
    parser.add_argument("overrides", nargs="*", help="configuration overrides of everything")
    options = arguments(parser)
    session = opened(options, "inner", [])
    run = session.run
    with run.stage("evaluate", 1):  # labels are read in the evaluator's name
        loops = list(inner_loops(run, run.roles["editor"].inner))
        lines = list(edit_lines(run, run.roles["editor"]))
    engine = dict(run.models.engine.key)
    session.close()
    found = {
        "inner_loop": loops,
        "edit_lines": lines,
        "one_round": [one_round(options, updater) for updater in UPDATERS],
        "command": {"people": options.people, "overrides": options.overrides},
        "commit": commit(),
        "versions": versions(),
        "machine": {**describe(torch.device(engine["device"])), "engine": engine},
    }
    write_json(options.out, found)


def opened(options: argparse.Namespace, name: str, overrides: Sequence[str]) -> Session:
    """A session of `strategy=seal` in a folder of its own."""
    sizes = [f"task.train={options.people}", f"task.validation={options.people}", f"editor.contexts={options.people}", "guard.rounds.rounds=1"]
    composed = config.compose(["strategy=seal", "evaluator.arms=[edits]", *sizes, *overrides, *options.overrides])
    return Session(config.build(composed), options.work / f"{name}_{options.people}")


def inner_loops(run: Run, base: InnerLoop) -> Iterator[dict[str, Any]]:
    """Closed-book accuracy after the inner loop on the passage, and on the passage with the gold pairs in both forms."""
    every = [(layer, epochs, 1, what) for layer, epochs in itertools.product(LEARNING_RATES, EPOCHS) for what in ("passage", "prompt", "text")]
    for layer, epochs, batch, what in [*every, *((layer, max(EPOCHS), 4, "prompt") for layer in LEARNING_RATES)]:
        rate = LEARNING_RATES[layer] * (2 if batch > 1 else 1)  # fewer steps, and so larger ones
        lora = {**base.lora, "first_layer": layer, "learning_rate": rate, "epochs": epochs, "batch": batch}
        inner = dataclasses.replace(base, lora=lora, pairs="text" if what == "text" else "prompt")
        items = run.task.validation
        gold = run.task.labels(q for i in items for q in i.questions)
        pairs = [[] if what == "passage" else [inner.pair(i, q.text, gold[q.id][0]) for q in i.questions] for i in items]
        jobs = [(run.models.root, (*inner.documents(i, ""), *p)) for i, p in zip(items, pairs, strict=True)]
        adapted = inner.train(run, jobs, [run.seed_for("exploration", i.id) for i in items])
        graded = inner.accuracy(run, list(zip(adapted, items, strict=True)))
        run.models.retain([])
        setting = {"first_layer": layer, "learning_rate": rate, "epochs": epochs, "batch": batch}
        documents = "passage" if what == "passage" else f"passage and gold pairs as {what}"
        found = {**setting, "documents": documents, **summary({q: g for item in graded for q, g in item.items()})}
        print(found, flush=True)
        yield found


def edit_lines(run: Run, base: SelfEdits) -> Iterator[dict[str, Any]]:
    """The share of the untrained model's lines that name the person and state an accepted answer, by prompt and temperature."""
    items = run.task.validation
    gold = run.task.labels(q for i in items for q in i.questions)
    for (prompt, tokens), temperature in itertools.product(PROMPTS.items(), TEMPERATURES):
        editor = dataclasses.replace(base, prompt_name=prompt, max_tokens=tokens, temperature=temperature)
        edits = editor.write(run, run.models.root, items, 1, "exploration")
        states = []
        for item, edit in zip(items, edits, strict=True):
            for line in edit.text.splitlines():
                said = Contains().grade([Answer(q.text, gold[q.id], answer_of(line)) for q in item.questions], run.ledger)
                states.append(any(said) and any(name in line for name in item.title.split()))
        found = {"prompt": prompt, "temperature": temperature, "lines": len(states), "share": sum(states) / max(1, len(states))}
        print(found, flush=True)
        yield found


def one_round(options: argparse.Namespace, updater: str) -> dict[str, Any]:
    """The closed-book accuracy that the root's and its child's own edits reach, after one round with this updater."""
    session = opened(options, updater, [f"updater={updater}"])
    lineage = session.improve()
    scores = dict(lineage.round(0).scores)
    [child] = lineage.round(0).children or [lineage.root]
    measured = {"untrained": summary(scores[lineage.root.id].per_item), "after_the_round": summary(scores[child.id].per_item)}
    found = {"updater": updater, "kept": UPDATERS[updater], **measured}
    print(found, flush=True)
    return found


if __name__ == "__main__":
    main()
