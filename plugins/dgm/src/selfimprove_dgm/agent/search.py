"""The search: one edit at a time, in an order, until the examples pass or the budget is spent."""

import ast
import importlib
import os
from dataclasses import dataclass, field

import examples


@dataclass
class Found:
    source: str
    log: dict = field(default_factory=dict)


def operators():
    """The edit operators of this agent, by name."""
    names = sorted(n[:-3] for n in os.listdir("operators") if n.endswith(".py") and not n.startswith("_"))
    return {n: importlib.import_module("operators." + n) for n in names}


def edited(tree, edits):
    """Sources that one operator makes, one after another."""
    for _ in edits(tree):
        yield ast.unparse(tree)


def candidates(source, order):
    """Edited sources, in the order of the configuration."""
    streams = [edited(ast.parse(source), module.edits) for module in operators().values()]
    if order == "by_operator":
        for stream in streams:
            yield from stream
    else:  # in turn
        while streams:
            for stream in list(streams):
                try:
                    yield next(stream)
                except StopIteration:
                    streams.remove(stream)


def repair(source, entry, config):
    """The first edited source that passes every example; the source as it was where there is none."""
    pairs = examples.examples(source, entry, config["examples"])
    log = {"examples": len(pairs), "tried": 0, "spent": False, "passed": []}
    if not pairs:
        return Found(source, log)
    if examples.passed(source, entry, pairs) == len(pairs):
        return Found(source, {**log, "passed": pairs})
    for candidate in candidates(source, config["order"]):
        if log["tried"] >= config["budget"]:
            log["spent"] = True
            break
        log["tried"] += 1
        if examples.passed(candidate, entry, pairs) == len(pairs):
            return Found(candidate, {**log, "passed": pairs})
    return Found(source, log)
