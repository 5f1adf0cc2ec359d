"""The pages of the configuration groups: every option's file, with the arguments of the class that it names, read without importing it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import griffe
import yaml

from selfimprove import discovery
from selfimprove.config import GROUPS
from selfimprove.discovery import CORE, Option

ABOUT = {
    "strategy": "A strategy chooses an option of every role, and what else it needs. Every choice can be replaced.",
    "selector": "Which candidates are the parents of a round.",
    "editor": "What parents propose, and the trials that come of it.",
    "rewarder": "What the strategy optimises: one evaluation for every trial.",
    "updater": "The candidates that are made of rewarded trials.",
    "evaluator": "What candidates are believed to be worth; `selfimprove eval` asks it for the sealed test.",
    "task": "Items and questions, in a training, a validation and a sealed test split.",
    "model": "The model that a run begins with.",
    "engine": "What computes: this process, a server, or a script.",
    "grader": "Whether an answer is right.",
    "sandbox": "Where code runs that nobody has read.",
    "guard": "When a run stops. A run takes any number: `guard=[rounds,budget]`.",
    "observer": "What watches and changes nothing. A run takes any number: `observer=[progress,tensorboard]`.",
    "middleware": "What is put around roles. A run takes any number: `middleware=[truth,forgetting]`.",
}
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Argument:
    """One argument of a class, as its signature and its docstring have it."""

    type: str
    default: str
    about: str


@functools.cache
def groups() -> dict[str, list[Option]]:
    """The options of this project's distributions by group, in the order of the command line."""
    found: dict[str, list[Option]] = {g: [] for g in GROUPS}
    for source in discovery.sources():
        if source.distribution == CORE or source.distribution.startswith(f"{CORE}-"):
            for option in source.options():
                if option.group:
                    found.setdefault(option.group, []).append(option)
    return {g: sorted(options, key=lambda o: o.name) for g, options in found.items() if options}


def index() -> str:
    """The page that lists the groups and their options."""
    rows = [f"| [`{g}`]({g}.md) | {ABOUT.get(g, '')} | {', '.join(f'[`{o.name}`]({g}.md#{anchor(o)})' for o in os)} |" for g, os in groups().items()]
    return "\n".join(
        (
            "# Options",
            "",
            "Everything that can be chosen with `GROUP=OPTION`, and every value inside it with `GROUP.KEY=VALUE`. "
            "Written from the option files and from the signatures of the classes that they name. "
            "`selfimprove list` says what is installed where you are.",
            "",
            "| group | what it chooses | options |",
            "|---|---|---|",
            *rows,
            "",
        )
    )


def page(group: str, options: Sequence[Option]) -> str:
    """The page of one group."""
    return "\n".join((f"# {group}", "", ABOUT.get(group, ""), "", *(line for option in options for line in _section(option))))


def anchor(option: Option) -> str:
    return f"{option.group}-{option.name}"


def _section(option: Option) -> Iterator[str]:
    yield f"## `{option.group}={option.name}` {{ #{anchor(option)} }}"
    yield ""
    yield f"{option.summary.rstrip('.')}. From `{option.source.distribution}`."
    yield ""
    values = yaml.safe_load(option.text) or {}
    if option.group == "strategy":
        yield from _choices(values)
        return
    for entry in values.get("defaults", ()):
        if isinstance(entry, str) and entry != "_self_":
            base, _, place = entry.partition("@")
            under = f"Under `{place}`, everything is" if place else "Everything else is"
            yield f"{under} as in [`{option.group}={base}`](#{option.group}-{base})."
            yield ""
    target = target_of(option)
    if target and "_target_" in values:
        yield f"Class `{target}`: {summary_of(target)}"
        yield ""
    yield from _values(option, values, arguments_of(target), every="_target_" in values)


def _values(option: Option, values: Values, arguments: Mapping[str, Argument], every: bool) -> Iterator[str]:
    """The table of an option's values; of all that its class takes, or of those that it sets."""
    notes = comments(option.text)
    own = dict(_flat({k: v for k, v in values.items() if k != "defaults"}))
    if not (names := [*own, *(n for n in arguments if every and n not in values)]):
        return
    yield "| value | type | here | default | what it is |"
    yield "|---|---|---|---|---|"
    for name in names:
        argument = arguments.get(name, Argument("", "", ""))
        here = _code(_short(own[name])) if name in own else ""
        about = argument.about or notes.get(name.rpartition(".")[2], "")
        yield _row(f"`{name}`", _code(argument.type), here, _code(argument.default), about)
    yield ""


def target_of(option: Option) -> str:
    """The class that an option makes, by its own word or by that of the option that it goes on from; empty without one."""
    values = yaml.safe_load(option.text) or {}
    if "_target_" in values:
        return str(values["_target_"] or "")
    for entry in values.get("defaults", ()):
        base = next((o for o in groups().get(option.group, ()) if o.name == entry), None)
        if base is not None and (found := target_of(base)):
            return found
    return ""


def _choices(values: Values) -> Iterator[str]:
    """What a strategy chooses, with links."""
    yield "| group | option |"
    yield "|---|---|"
    for entry in values.get("defaults", ()):
        if isinstance(entry, dict):
            for key, chosen in entry.items():
                group = str(key).removeprefix("override ").lstrip("/").partition("@")[0]
                names = chosen if isinstance(chosen, list) else [chosen]
                yield f"| `{group}` | {', '.join(f'[`{n}`]({group}.md#{group}-{n})' if n else 'none' for n in names)} |"
        elif entry != "_self_":
            yield f"| `strategy` | everything else as in [`{entry}`](#strategy-{entry}) |"
    yield ""
    own = {k: v for k, v in values.items() if k != "defaults"}
    if own:
        yield "```yaml"
        yield yaml.safe_dump(own, sort_keys=False, allow_unicode=True, default_flow_style=None).rstrip()
        yield "```"
        yield ""


def _flat(values: Values, at: str = "") -> Iterator[tuple[str, Any]]:
    """Every value by its dotted key."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{at}{key}.")
        elif key != "_target_":
            yield f"{at}{key}", value


def comments(text: str) -> dict[str, str]:
    """The remark behind each key of an option file."""
    return {m[1]: m[2].strip() for m in re.finditer(r"^\s*(\w+):.*?\s#\s+(.+)$", text, flags=re.MULTILINE)}


@functools.cache
def class_of(target: str) -> griffe.Class | None:
    """The class that a `_target_` names, read from source; None where it cannot be found."""
    package, _, path = target.partition(".")
    if not path:
        return None
    try:
        found = _package(package)[path]
        if found.is_alias:
            found = found.final_target
    except (KeyError, griffe.GriffeError):
        return None
    return found if isinstance(found, griffe.Class) else None


@functools.cache
def _package(name: str) -> griffe.Object:
    loaded = _loader().load(name)
    assert isinstance(loaded, griffe.Object)
    return loaded


@functools.cache
def _loader() -> griffe.GriffeLoader:
    """One for all packages, so that a plugin's class inherits from the core's."""
    loader = griffe.GriffeLoader()
    loader.load(CORE)
    return loader


def summary_of(target: str) -> str:
    """The first line of a class's docstring."""
    cls = class_of(target)
    return cls.docstring.value.strip().splitlines()[0] if cls is not None and cls.docstring is not None else ""


def arguments_of(target: str) -> dict[str, Argument]:
    """The arguments of a class by name."""
    cls = class_of(target)
    if cls is None:
        return {}
    about, rest = described(cls), (griffe.ParameterKind.var_keyword, griffe.ParameterKind.var_positional)
    taken = [p for p in cls.parameters if p.name != "self" and p.kind not in rest]
    return {p.name: Argument(_plain(p.annotation), "required" if p.default is None else str(p.default), about.get(p.name, "")) for p in taken}


def described(cls: griffe.Class) -> dict[str, str]:
    """What a class says of its arguments: in the section `Args` of its docstring, or under a field."""
    found: dict[str, str] = {}
    for name, member in cls.all_members.items():
        if member.is_attribute and member.docstring is not None:
            found[name] = _one_line(member.docstring.value)
    text = cls.docstring.value if cls.docstring is not None else ""
    for section in griffe.Docstring(text).parse("google", warnings=False):
        if section.kind is griffe.DocstringSectionKind.parameters:
            for entry in section.value:
                found.update({name.strip(): _one_line(entry.description) for name in entry.name.split(",")})
    return found


def _plain(annotation: Any) -> str:
    return "" if annotation is None else str(annotation).replace("typing.", "")


def _short(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).strip().removesuffix("...").strip()
    return text if len(text) <= 80 else text[:77] + "…"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _row(*cells: str) -> str:
    """A row of a table; a pipe inside code is none of its borders."""
    return f"| {' | '.join(re.sub(r'(`[^`]*`)|[|]', lambda m: m[1] or chr(92) + '|', c) for c in cells)} |"


def _one_line(text: str) -> str:
    return re.sub(r"``([^`]+)``", r"`\1`", " ".join(text.split()))
