"""Whether an installed plugin keeps what its users may expect: its metadata, its options, its classes, its strategies."""

from __future__ import annotations

import inspect
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from packaging.utils import canonicalize_name

from selfimprove import config, discovery
from selfimprove.discovery import Option, Source
from selfimprove.errors import ConfigError, SelfImproveError
from selfimprove.hooks import API
from selfimprove.testing import StrategyConformance
from selfimprove.testing.inspection import heavy_imports, unknown_arguments


@dataclass(frozen=True)
class Row:
    """One thing that was checked."""

    what: str
    passed: bool
    message: str
    """Why it failed, or what its passing means."""
    seconds: float


def rows(package: str, chosen: Sequence[str] | None = None, announce: Callable[[str], None] = lambda what: None) -> Iterator[Row]:
    """Everything that is checked of a distribution, one after the other.

    Args:
        package: the distribution.
        chosen: which of its strategies are run; None runs all.
        announce: told what is checked next.

    Raises: ConfigError, where no such distribution or strategy is installed.
    """
    found = named(package)
    options = [o for s in found for o in s.options()]
    strategies = [o.name for o in options if o.group == "strategy"]
    if strange := [n for n in chosen or () if n not in strategies]:
        raise ConfigError(
            f"{package} has no strategy {strange[0]!r}{discovery.nearest(strange[0], strategies)} (it has {', '.join(strategies) or 'none'})"
        )

    def row(what: str, check: Callable[[], object], means: str) -> Row:
        announce(what)
        start = time.monotonic()
        try:
            check()
        except (AssertionError, SelfImproveError) as e:
            return Row(what, False, str(e).splitlines()[0] if str(e) else type(e).__name__, time.monotonic() - start)
        except Exception as e:  # whatever a plugin raises is the plugin's failure, and the next check is made  # noqa: BLE001
            return Row(what, False, f"{type(e).__name__}: {e}", time.monotonic() - start)
        return Row(what, True, means, time.monotonic() - start)

    yield row("installation", lambda: _unbroken(found), f"what it needs is installed; it is written for hooks {API}")
    yield row(
        "option names", lambda: discovery.check_unique(o for s in discovery.sources() for o in s.options()), "nobody else offers one of its options"
    )
    for option in options:
        yield row(f"{option.group}={option.name}", lambda option=option: _option(option), option.summary)  # type: ignore[misc]
    modules = sorted({t.rpartition(".")[0] for o in options for t in _targets(o)})
    yield row("import", lambda: _light(modules), "its modules bring no library that takes seconds to import")
    for name in strategies if chosen is None else chosen:
        case = type(f"Conformance_{name}", (StrategyConformance,), {"strategy": name})()
        for test in (n for n in vars(StrategyConformance) if n.startswith("test_")):
            method = getattr(case, test)
            means = (inspect.getdoc(method) or "").splitlines()[0]
            yield row(f"{name}: {test.removeprefix('test_').replace('_', ' ')}", lambda method=method: _in_a_folder(method), means)  # type: ignore[misc]


def named(package: str) -> list[Source]:
    """The sources of a distribution, by its name or the name of a package of it. Raises: ConfigError."""
    everything = discovery.sources()
    wanted = canonicalize_name(package)
    found = [s for s in everything if wanted in {canonicalize_name(n) for n in (s.distribution, *s.prefixes)}]
    if not found:
        names = sorted({s.distribution for s in everything})
        raise ConfigError(f"no plugin {package!r} is installed{discovery.nearest(package, names)} (installed: {', '.join(names)})")
    return found


def _unbroken(found: Sequence[Source]) -> None:
    for source in found:
        if (reason := source.broken()) is not None:
            raise ConfigError(reason)


def _option(option: Option) -> None:
    """Refuse an option that says nothing about itself, or whose classes do not exist or do not take what it gives."""
    assert option.group in config.GROUPS, f"there is no group {option.group!r}{discovery.nearest(option.group, config.GROUPS)}"
    assert option.summary, f"{option.path.name} begins with no comment; its first line is what `selfimprove list` shows"
    found = discovery.sources()
    for at, node in discovery.nodes(yaml.safe_load(option.text)):
        cls = config.located(node["_target_"], at or option.group, found)
        if not any(isinstance(v, str) and ("???" in v or "${" in v) for v in node.values()):  # what is not there yet cannot be judged
            config.check_arguments(at or option.group, cls, node)
        assert not (strange := unknown_arguments(cls)), "; ".join(strange)


def _targets(option: Option) -> list[str]:
    try:
        return option.targets()
    except (yaml.YAMLError, OSError):
        return []


def _light(modules: Sequence[str]) -> None:
    if modules and (heavy := heavy_imports(modules)):
        raise ConfigError(f"importing {', '.join(modules)} brings {', '.join(heavy)}; import them in the functions that need them")


def _in_a_folder(method: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory(prefix="selfimprove-check-") as folder:
        method(Path(folder))
