"""The run folder: its name, what it records of configuration and versions, and opening it again."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from selfimprove import config as configuration
from selfimprove.config import Config
from selfimprove.discovery import CORE, nearest, version_of
from selfimprove.errors import ConfigError, ResumeError
from selfimprove.identity import digest
from selfimprove.models import Shared
from selfimprove.records import Candidate, Lineage
from selfimprove.session import Session
from selfimprove.storage import is_temporary, write_bytes, write_json
from selfimprove.task import Split

CONFIG, VERSIONS, JOURNAL, TEST = "config.yaml", "versions.json", "journal.jsonl", "test.json"
EXACT = (CORE, "torch", "transformers", "peft", "numpy")
"""Distributions whose version decides numbers; a run goes on with the same ones only."""
NOTED = ("trl", "accelerate", "safetensors", "tokenizers", "pluggy", "hydra-core", "omegaconf")


def fresh(config: Config, job: int | None = None) -> Path:
    """A new run folder, made: the configured one, or one named after date, time, strategy and seed.

    Raises: ConfigError, where the configured one is not empty or cannot be made.
    """
    chosen = config.values["run"]["folder"]
    folder = Path(chosen).expanduser() if chosen else Path("runs", f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{config.strategy}_s{config.seed}")
    if chosen and job is not None:
        folder /= str(job)
    try:
        if chosen:
            _check_empty(folder)
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        for number in range(1, 10_000):
            numbered = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
            try:
                numbered.mkdir()
            except FileExistsError:
                continue
            return numbered
    except OSError as e:
        raise ConfigError(f"the run folder {folder} cannot be made: {e.strerror or e}; choose another with run.folder=PATH") from e
    raise ConfigError(f"{folder} and its numbered neighbours exist; choose a folder with run.folder=PATH")


def _check_empty(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"run.folder={folder} is a file; choose a folder that is new or empty")
    if (folder / JOURNAL).exists() or (folder / CONFIG).exists():
        raise ConfigError(f"{folder} already holds a run; go on with it (`selfimprove resume {folder}`), or choose another run.folder")
    if not all(p.name == VERSIONS or is_temporary(p) for p in folder.iterdir()):  # left by a kill before the run began
        raise ConfigError(f"{folder} holds other files; choose a run.folder that is new or empty")


def record(config: Config, folder: Path) -> None:
    """Write what the run is made of. The configuration comes last: a folder without it never began."""
    write_json(folder / VERSIONS, made_of(config))
    write_bytes(folder / CONFIG, config.text().encode())


def made_of(config: Config) -> dict[str, Any]:
    """The versions that a run uses, and its configuration once more, so that a change of either can be named."""
    exact = {*EXACT, *(s.distribution for s in config.sources())}
    return {
        "packages": {name: version_of(name) for name in sorted(exact)},
        "noted": {name: version for name in NOTED if (version := version_of(name))},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "git": git_commit(),
        "configuration": flat(config.recorded),
    }


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with ``-dirty`` where files differ; None outside one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None  # installed inside somebody else's repository
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def recorded(folder: Path) -> Config:
    """The configuration of a run folder, if the folder is unchanged and made with what is installed now.

    Raises: ResumeError, naming every difference; ConfigError.
    """
    if not folder.is_dir():
        near = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        raise ResumeError(f"there is no run folder {folder}{nearest(folder.name, near)}")
    if not (folder / CONFIG).exists():
        raise ResumeError(f"{folder} holds no run (no {CONFIG}); name a folder that `selfimprove run` made, or start one in it")
    config = configuration.load(folder / CONFIG)
    try:
        then = json.loads((folder / VERSIONS).read_text(encoding="utf-8"))
        packages, settings = dict(then["packages"]), dict(then["configuration"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ResumeError(f"{folder / VERSIONS} cannot be read ({type(e).__name__}: {e}); restore it from a copy") from e
    now = made_of(config)
    differences = [
        *_differences(packages, now["packages"], "the run was made with", "installed is"),
        *_differences(settings, now["configuration"], "the run was made with", f"{CONFIG} now says"),
    ]
    if differences:
        raise ResumeError(
            f"{folder} was made with something else, so it cannot go on exactly:\n  "
            + "\n  ".join(differences)
            + "\nbring back what it was made with, or start a new run"
        )
    return config


def opened(folder: Path, split: Split = "validation", only_measure: bool = False, trust_env: bool = False) -> tuple[Config, Session]:
    """The session of a run folder, from the state of its last complete round. Raises: ResumeError, ConfigError."""
    config = trusted(folder, trust_env)
    if only_measure and not (folder / JOURNAL).exists():
        raise ResumeError(f"{folder} has no round yet; go on with it (`selfimprove resume {folder}`)")
    return config, Session(configuration.build(config, only_measure), folder, split)


def trusted(folder: Path, trust_env: bool) -> Config:
    """What a run folder was configured as, where that may be built.

    A run folder may come from a stranger, and its judge may live at any address: without `trust_env`, a configuration that reads
    the environment is refused, so that no key leaves without its owner's word.

    Raises: ResumeError, ConfigError.
    """
    config = recorded(folder)
    if config.environment and not trust_env:
        addresses = sorted({v for _, v in flat(config.recorded).items() if isinstance(v, str) and "://" in v})
        raise ConfigError(
            f"the configuration of {folder} reads {', '.join(config.environment)} from your environment"
            + (f" and names {', '.join(addresses)}" if addresses else "")
            + "; if you trust it with that, add --trust-env"
        )
    return config


def shared(tiles: Path | None) -> Shared | None:
    """The finished tiles in a folder that runs share, of those that were made with what is installed now."""
    return None if tiles is None else Shared(tiles / digest({name: version_of(name) for name in EXACT})[:16])


def candidate(lineage: Lineage, name: str) -> Candidate:
    """A candidate by id, the beginning of an id, or ``root``, ``latest``, ``best``. Raises: ConfigError."""
    named = {"root": lineage.root, "latest": lineage.latest, "best": lineage.best()}
    if name in named:
        if (found := named[name]) is None:
            raise ConfigError("no candidate of this run has a score, so none is the best; name one by id, or `latest`")
        return found
    matches = [c for c in lineage if c.id.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ConfigError(f"{len(matches)} candidates begin with {name!r}: {', '.join(c.id for c in matches[:5])}; write more of the id")
    some = ", ".join(c.id[:12] for c in list(lineage)[-5:])
    raise ConfigError(f"the run has no candidate {name!r}; name root, latest, best or the beginning of an id (the last are {some})")


def flat(node: Any, at: str = "") -> dict[str, Any]:
    """The values of a configuration by dotted key; lists and empty mappings are values."""
    if isinstance(node, Mapping) and node:
        return {k: v for key, value in node.items() for k, v in flat(value, f"{at}.{key}" if at else str(key)).items()}
    return {at: node}


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], made: str, current: str) -> list[str]:
    nothing = "nothing"
    keys = [*then, *(k for k in now if k not in then)]
    return [f"{k}: {made} {then.get(k, nothing)}, {current} {now.get(k, nothing)}" for k in keys if then.get(k, nothing) != now.get(k, nothing)]
