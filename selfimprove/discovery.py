"""What is installed: every distribution that offers configuration, and every option in it. No plugin code is imported.

A plugin is a normal package with an entry point in the group `selfimprove.conf` whose value is its package of YAML files:

    [project.entry-points."selfimprove.conf"]
    my_plugin = "my_plugin.conf"

A folder in that package is a config group, a file in it an option. `_target_` names the class that the option makes.
"""

from __future__ import annotations

import ast
import difflib
import importlib.metadata
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion

from selfimprove.errors import ConfigError

GROUP = "selfimprove.conf"
CORE = "selfimprove"
VERSIONS = "selfimprove.api"
"""The group of the entry point that says which hooks a distribution is written for; a distribution without it means the first."""
API = "v1"
"""The version of the hooks; see `hooks`."""


@dataclass(frozen=True)
class Source:
    """One distribution that offers configuration."""

    distribution: str
    version: str
    package: str
    """The package of YAML files, as its entry point names it."""
    requires: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    """Top-level modules that the distribution says it installs."""
    api: str = "v1"
    """The version of the hooks that it is written for."""

    @cached_property
    def folder(self) -> Path | None:
        """Where the YAML files are; None where the package is missing."""
        spec = find_spec(self.package)
        places = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
        return next((p for p in places if p.is_dir()), None)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Packages that a `_target_` may name because this distribution is installed."""
        return tuple(dict.fromkeys((self.package.rpartition(".")[0] or self.package, *self.modules)))

    def owns(self, target: str) -> bool:
        return any(target == p or target.startswith(p + ".") for p in self.prefixes)

    def options(self) -> Iterator[Option]:
        """Every option, by group and name."""
        if self.folder is not None:
            for path in sorted(self.folder.rglob("*.yaml")):
                group = path.parent.relative_to(self.folder).as_posix()
                if group != "." or self.distribution != CORE:
                    yield Option("" if group == "." else group, path.stem, self, path)

    def unknown_api(self) -> str | None:
        """Why the hooks that it is written for are not those of this core, or None."""
        if self.api == API:
            return None
        newer = self.api.removeprefix("v").isdecimal() and int(self.api.removeprefix("v")) > int(API.removeprefix("v"))
        other = f"or a version of {self.distribution} for {API}"
        remedy = (
            f"upgrade selfimprove (`pip install --upgrade selfimprove`), {other}" if newer else f"install a selfimprove that has {self.api}, {other}"
        )
        return f"it is written for version {self.api} of the hooks, and selfimprove {version_of(CORE)} has {API}; {remedy}"

    def broken(self) -> str | None:
        """Why nothing of this distribution can work, or None."""
        if (reason := self.unknown_api()) is not None:
            return reason
        if self.folder is None:
            return f"its entry point names {self.package}, which is not there; install it again"
        for text in self.requires:
            try:
                requirement = Requirement(text)
                if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                    continue
                have = importlib.metadata.version(requirement.name)
                if not requirement.specifier.contains(have, prereleases=True):
                    return f"it needs {requirement.name}{requirement.specifier}, and {have} is installed; install one that fits"
            except importlib.metadata.PackageNotFoundError:
                return f"it needs {text}, which is not installed; run `pip install '{text}'`"
            except (InvalidRequirement, InvalidVersion):
                continue
        return None


@dataclass(frozen=True)
class Option:
    """One YAML file: an option of a config group."""

    group: str
    name: str
    source: Source
    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def summary(self) -> str:
        """The file's first comment."""
        for line in self.text.splitlines():
            if not line.startswith("#"):
                break
            if not (comment := line.lstrip("# ").strip()).startswith("@package"):
                return comment
        return ""

    def targets(self) -> list[str]:
        """Every class that the file names. Raises: yaml.YAMLError."""
        return [str(n["_target_"]) for _, n in nodes(yaml.safe_load(self.text))]

    def broken(self) -> str | None:
        """Why this option cannot work, or None; found without importing what it names."""
        try:
            targets = self.targets()
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as e:
            return f"{self.path.name} is not YAML ({str(e).splitlines()[0]})"
        return next((reason for t in targets if (reason := missing_target(t))), None)


def sources() -> list[Source]:
    """The core and every installed plugin distribution, in the order of their names."""
    plugins: dict[tuple[str, str], Source] = {}
    for dist in importlib.metadata.distributions():
        points = [e for e in dist.entry_points if e.group == GROUP]
        if not points:
            continue
        name = dist.metadata["Name"] or points[0].name
        modules = tuple((dist.read_text("top_level.txt") or "").split())
        api = next((e.value for e in dist.entry_points if e.group == VERSIONS), "v1")
        for point in points:  # the first on the path is the one that Python imports
            plugins.setdefault((name, point.value), Source(name, dist.version, point.value, tuple(dist.requires or ()), modules, api))
    return [core(), *sorted(plugins.values(), key=lambda s: (s.distribution, s.package))]


def core() -> Source:
    return Source(CORE, version_of(CORE) or "not installed", f"{CORE}.conf")


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_unique(options: Iterable[Option]) -> None:
    """Refuse two options of one name: of two files Hydra would take the first without a word.

    Raises: ConfigError, naming both distributions.
    """
    seen: dict[tuple[str, str], Option] = {}
    for option in options:
        first = seen.setdefault((option.group, option.name), option)
        if first is not option:
            raise ConfigError(
                f"{_place(option)} is offered by {first.source.distribution} and by {option.source.distribution}; "
                f"uninstall one (`pip uninstall {option.source.distribution}`), or ask its author for a name of its own"
            )


def _place(option: Option) -> str:
    return f"the option {option.group}={option.name}" if option.group else f"the configuration {option.name}.yaml"


def nodes(node: Any, at: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(path, node) of every node of a configuration that names a class."""
    if isinstance(node, Mapping):
        if node.get("_target_") is not None:
            yield at, node
        for key, value in node.items():
            yield from nodes(value, f"{at}.{key}" if at else str(key))
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from nodes(value, f"{at}[{i}]")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ``; did you mean seal?``, or nothing where no known name is near."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def find_spec(name: str) -> ModuleSpec | None:
    """The spec of a module, found like `importlib.util.find_spec` but without importing its parents."""
    spec: ModuleSpec | None = None
    parts = name.split(".")
    for i in range(len(parts)):
        path = None if spec is None else spec.submodule_search_locations
        if i and path is None:
            return None
        try:
            spec = _spec(".".join(parts[: i + 1]), None if path is None else tuple(path), tuple(sys.path))
        except ModuleNotFoundError:
            return None
    return spec


@cache  # modules import the same ones; an exception is not kept, so what is not there yet is found when it is
def _spec(name: str, within: tuple[str, ...] | None, path: tuple[str, ...]) -> ModuleSpec:
    found = (f.find_spec(name, within) for f in sys.meta_path if hasattr(f, "find_spec"))
    spec = next((s for s in found if s is not None), None)
    if spec is None:
        raise ModuleNotFoundError(name)
    return spec


def missing_target(target: str) -> str | None:
    """Why a dotted class name cannot exist, or None; read from source text, without importing it."""
    module, _, name = target.rpartition(".")
    spec = find_spec(module) if module else None
    if spec is None:
        return f"_target_ {target}: there is no module {module or target}"
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    try:
        known = _read(spec.origin).bound
    except (OSError, SyntaxError, UnicodeDecodeError) as e:
        return f"_target_ {target}: {spec.origin} cannot be read ({e})"
    if (absent := missing_import(module)) is not None:
        return f"_target_ {target}: {absent}"
    if name in known or {"*", "__getattr__"} & known:
        return None
    return f"_target_ {target}: module {module} has no {name}{nearest(name, known)}"


def missing_import(module: str, seen: set[str] | None = None) -> str | None:
    """Which import of a module, or of those of its own distribution that it imports, leads nowhere; read from source text, or None."""
    seen = set() if seen is None else seen
    if module in seen:
        return None
    seen.add(module)
    top, spec = module.partition(".")[0], find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    try:
        wanted = _read(spec.origin).imports
    except (OSError, SyntaxError, UnicodeDecodeError) as e:
        return f"{spec.origin} cannot be read ({e})"
    for name in wanted:
        first = name.partition(".")[0]
        if first not in sys.stdlib_module_names and find_spec(name if first == top else first) is None:
            return f"module {module} imports {name}, which is not installed"
        if first == top and (deeper := missing_import(name, seen)) is not None:
            return deeper
    return None


@dataclass(frozen=True)
class _Read:
    """What the text of a module says."""

    imports: tuple[str, ...]
    """What it imports at its top level; what stands in functions, in a `try` or under an `if` need not be there."""
    bound: frozenset[str]


def _read(path: str) -> _Read:
    """Raises: OSError, SyntaxError, UnicodeDecodeError."""
    now = os.stat(path)
    return _read_once(path, now.st_mtime_ns, now.st_size)


@cache  # many options are of the same modules
def _read_once(path: str, changed: int, size: int) -> _Read:
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    imports: list[str] = []
    for node in tree.body:
        match node:
            case ast.Import(names=names):
                imports += [n.name for n in names]
            case ast.ImportFrom(module=str(name), level=0):
                imports.append(name)
    return _Read(tuple(imports), frozenset(_bound(tree)))


def _bound(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                yield name
            case ast.ImportFrom(names=names) | ast.Import(names=names):
                yield from (a.asname or a.name for a in names)
            case ast.Name(id=name, ctx=ast.Store()):
                yield name
