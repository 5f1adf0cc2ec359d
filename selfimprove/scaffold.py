"""A new plugin: a package of its own, whose tests pass and whose strategy runs before a line of it is written."""

from __future__ import annotations

import keyword
import sys
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from string import Template

from selfimprove import discovery
from selfimprove.errors import ConfigError
from selfimprove.hooks import API, ROLES
from selfimprove.storage import write_bytes

KINDS = (*ROLES, "middleware", "observer")
"""What a package can be begun with."""
PAPER = {
    "selector": "P = select(L)",
    "editor": "E = propose(P);  T = apply(E)",
    "rewarder": "R = reward(T)",
    "updater": "C = update(T, R)",
    "evaluator": "S = evaluate(C)",
}
STAND_IN = {"selector": "latest", "editor": "toy", "rewarder": "toy", "updater": "toy", "evaluator": "toy"}
"""What fills a role that the package leaves out."""


def create(name: str, kinds: Sequence[str], parent: Path) -> Path:
    """The folder of a new package, written.

    Args:
        name: of the package, of its options and of its strategy.
        kinds: which roles it fills, and whether it holds a middleware or an observer.
        parent: the folder that it is written into.

    Raises: ConfigError, for a name that cannot be one or is taken, for an unknown role, or where the folder exists.
    """
    _check(name, kinds)
    folder = parent / name
    if folder.exists():
        raise ConfigError(f"{folder} exists; choose another name, or another folder with --into FOLDER")
    for path, text in _files(name, kinds):
        write_bytes(folder / path, text.encode())
    return folder


def _check(name: str, kinds: Sequence[str]) -> None:
    if not (name.isidentifier() and name.isascii() and name == name.lower()) or keyword.iskeyword(name) or name.startswith("_"):
        raise ConfigError(f"a plugin's name is a Python name in lower-case letters, such as my_method; got {name!r}")
    if name in sys.stdlib_module_names or discovery.find_spec(name) is not None:
        raise ConfigError(f"the name {name!r} is taken by a module that is installed here; choose another")
    for option in (o for s in discovery.sources() for o in s.options()):
        if option.name == name and option.group in ("strategy", *kinds):
            raise ConfigError(f"the option {option.group}={name} is {option.source.distribution}'s; choose another name")
    if not kinds:
        raise ConfigError(f"a plugin wants at least one role: --roles {','.join(KINDS)}, or some of them")
    if unknown := [k for k in kinds if k not in KINDS]:
        raise ConfigError(f"there is no role {unknown[0]!r}{discovery.nearest(unknown[0], KINDS)} (known: {', '.join(KINDS)})")


def _files(name: str, kinds: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(path, text) of every file."""
    chosen = [k for k in KINDS if k in kinds]
    words = {
        "name": name,
        "distribution": name.replace("_", "-"),
        "Name": "".join(part.capitalize() for part in name.split("_")),
        "api": API,
        "core": _range(),
        "box": "\n".join(f"    {PAPER[k]:<34}{k}={name if k in chosen else STAND_IN[k]}" for k in ROLES),
        "defaults": "\n".join(_defaults(name, chosen)),
    }
    words["imports"] = "\n".join(f"from {name}.{k} import {words['Name']}{k.capitalize()}" for k in sorted(chosen))
    words["exports"] = ", ".join(sorted(f'"{words["Name"]}{k.capitalize()}"' for k in chosen))
    words["classes"] = ", ".join(sorted(f"{words['Name']}{k.capitalize()}" for k in chosen))
    words["tests"] = "\n\n\n".join(_filled(f"roles/{k}_test.txt", words).rstrip() for k in chosen)
    for path, source in {
        "pyproject.toml": "pyproject.txt",
        "README.md": "readme.txt",
        ".gitignore": "gitignore.txt",
        ".github/workflows/tests.yml": "workflow.txt",
        "tests/conftest.py": "conftest.txt",
        f"tests/test_{name}.py": "tests.txt",
        f"src/{name}/__init__.py": "init.txt",
        f"src/{name}/conf/strategy/{name}.yaml": "strategy.txt",
    }.items():
        yield path, _filled(source, words)
    yield f"src/{name}/py.typed", ""
    yield f"src/{name}/conf/__init__.py", ""
    for kind in chosen:
        yield f"src/{name}/{kind}.py", _filled(f"roles/{kind}.txt", words)
        yield f"src/{name}/conf/{kind}/{name}.yaml", _filled(f"roles/{kind}_conf.txt", words)


def _defaults(name: str, chosen: Sequence[str]) -> Iterator[str]:
    for role, other in STAND_IN.items():
        yield f"  - override /{role}: {name if role in chosen else other}"
    if "middleware" in chosen:
        yield f"  - override /middleware: [{name}]"
    if "observer" in chosen:
        yield f"  - override /observer: [progress, {name}]"
    yield "  - override /task: toy"
    yield "  - override /engine: toy"


def _range() -> str:
    """The versions of the core that a package made now works with: until 1.0 a minor version may break plugins."""
    major, minor = (discovery.version_of(discovery.CORE) or "0.1").split(".")[:2]
    return f">={major}.{minor},<{major}.{int(minor) + 1}" if major == "0" else f">={major}.{minor},<{int(major) + 1}"


def _filled(template: str, words: dict[str, str]) -> str:
    text = resources.files("selfimprove").joinpath("template", *template.split("/")).read_text(encoding="utf-8")
    return Template(text).substitute(words)
