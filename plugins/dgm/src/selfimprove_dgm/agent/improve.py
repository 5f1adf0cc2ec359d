"""Self-modification: looks at one task that this agent failed, and proposes a change of its own folder."""

import difflib
import json
import math
import os
import random

import search

WISH = "Answer with one unified diff in a ```diff block."


def proposal(job, config, send):
    """A diff of this folder, with its diagnosis; None for a diff where there is nothing to propose."""
    problem, text = diagnosis(job["task"], config)
    if job["free_form"]:
        return {"diff": written(text, send), "name": "free form", "diagnosis": text}
    edits = grammar(config, job["donors"])
    mind = job["machinery"] or config  # another agent's, where self-modification is switched off
    if mind["follow_diagnosis"] and any(e["group"] == problem for e in edits):
        edits = [e for e in edits if e["group"] == problem]
    if not edits:
        return {"diff": "", "name": "", "diagnosis": text}
    scores = send({"call": "score", "prompt": text, "texts": [e["name"] for e in edits]}) or [0.0] * len(edits)
    chance = random.Random(job["seed"])
    top = max(scores)
    weights = [math.exp((s - top) / mind["temperature"]) for s in scores]
    edit = chance.choices(edits, weights)[0]
    return {"diff": "".join(differences(edit["files"])), "name": edit["name"], "diagnosis": text}


def written(text, send):
    """The diff that a model writes when it is shown this folder."""
    files = sorted(os.path.join(d, n)[2:] for d, _, names in os.walk(".") for n in names if n.endswith((".py", "config.json")))
    shown = "\n".join(f"=== {n}\n{open(n, encoding='utf-8').read()}" for n in files)
    request = f"{text}\n\nThese are the files of the program that failed:\n\n{shown}\n\nImprove the program in general. " + WISH
    reply = send({"call": "generate", "prompt": request}) or ""
    block = reply.split("```diff\n", 1)[-1].split("\n```", 1)[0] if "```diff" in reply else reply
    return block.rstrip("\n") + "\n" if block.strip() else ""


def diagnosis(task, config):
    """What kept this agent from repairing a task: the group of edits that may help, and the reason in words."""
    log = search.repair(task["source"], task["entry"], config).log
    if not log["examples"]:
        return "examples", f"No example of the docstring of {task['entry']} could be read, so nothing could be tested."
    if log["spent"]:
        return "budget", f"The search for {task['entry']} spent its budget of {config['budget']} edits."
    if log["passed"]:
        return "examples", f"The {log['examples']} examples of {task['entry']} pass, yet it is not repaired: more examples are needed."
    return "operators", f"None of the {log['tried']} edits of {task['entry']} passes its {log['examples']} examples: other kinds of edit are needed."


def grammar(config, donors):
    """Every change that this agent can think of: a name, a group, and the new text of each file it touches (None deletes)."""
    have = set(search.operators())
    edits = [
        {"name": f"learn the operator {n}", "group": "operators", "files": {f"operators/{n}.py": text}}
        for n, text in sorted(donors.items())
        if n not in have
    ]
    edits += [{"name": f"forget the operator {n}", "group": "none", "files": {f"operators/{n}.py": None}} for n in sorted(have)]
    shapes = __import__("examples").SHAPES
    edits += [
        change(config, f"read examples written with {s}", "examples", examples=[*config["examples"], s])
        for s in shapes
        if s not in config["examples"]
    ]
    edits += [
        change(config, f"stop reading examples written with {s}", "none", examples=[x for x in config["examples"] if x != s])
        for s in config["examples"]
    ]
    edits.append(change(config, "double the search budget", "budget", budget=min(2 * config["budget"], 800)))
    edits.append(change(config, "halve the search budget", "none", budget=max(config["budget"] // 2, 1)))
    other = "in_turn" if config["order"] == "by_operator" else "by_operator"
    edits.append(change(config, f"take edits {other.replace('_', ' ')}", "budget", order=other))
    word = "ignore" if config["follow_diagnosis"] else "follow"
    edits.append(change(config, f"{word} the diagnosis when choosing a change", "none", follow_diagnosis=not config["follow_diagnosis"]))
    return edits


def change(config, name, group, **values):
    text = json.dumps({**config, **values}, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    return {"name": name, "group": group, "files": {"config.json": text}}


def differences(files):
    """The lines of a unified diff."""
    for name, text in files.items():
        before = open(name, encoding="utf-8").read() if os.path.exists(name) else ""
        old = f"a/{name}" if before else "/dev/null"
        new = "/dev/null" if text is None else f"b/{name}"
        yield from difflib.unified_diff(before.splitlines(True), (text or "").splitlines(True), old, new)
