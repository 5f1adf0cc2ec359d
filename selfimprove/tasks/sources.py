"""Reading tasks from files and from the hub, whatever they hold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfimprove import identity
from selfimprove.errors import ConfigError
from selfimprove.task import SPLITS, Split

LIMITS = {"title": 1_000, "context": 100_000, "question": 10_000, "answer": 10_000}
"""Characters. Longer fields are not questions about a passage, and no model would read them whole."""


def check_size(split: str, size: float) -> None:
    """Refuse what is neither a count nor a fraction. Raises: ConfigError."""
    if isinstance(size, bool) or not isinstance(size, (int, float)) or not math.isfinite(size) or size < 0:
        raise ConfigError(f"task.{split}={size!r} is no size; give a count such as 24, or a fraction such as 0.6")
    if isinstance(size, float) and size > 1:
        raise ConfigError(f"task.{split}={size} is no fraction; give one from 0 to 1, or a whole number")


def counts_of(sizes: Mapping[Split, float], total: int, source: str, what: str) -> dict[Split, int]:
    """How many of `total` things each split gets. Raises: ConfigError, where there are too few."""
    counts = {s: size if isinstance(size, int) else math.floor(size * total + 1e-9) for s, size in sizes.items()}
    wanted = " + ".join(f"{counts[s]} for {s}" for s in SPLITS)
    if sum(counts.values()) > total:
        raise ConfigError(
            f"{source} has {total} distinct {what}, but {wanted} are {sum(counts.values())}; lower task.train, task.validation or task.test"
        )
    for split, size in sizes.items():
        if size > 0 and counts[split] == 0:
            raise ConfigError(f"{source} has {total} distinct {what}, too few for task.{split}={size} of them; give a count, or a larger file")
    return counts


def hub_rows(dataset: str | None, config: str | None, rows: str, shape: str) -> tuple[str, list[dict[str, Any]]]:
    """The digest and the rows of a split of a hub's dataset, or of a local folder that `datasets` loads. Raises: ConfigError."""
    try:
        import datasets  # an extra, and slow to import
    except ImportError as error:
        raise ConfigError(
            "task.dataset needs the package `datasets`; install it with `pip install 'selfimprove[datasets]'`, or give task.path"
        ) from error
    import httpx

    try:
        loaded = datasets.load_dataset(dataset, config, split=rows)
    except (OSError, ValueError, RuntimeError, httpx.HTTPError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"task.dataset={dataset} (task.config={config}, task.rows={rows}) cannot be loaded: {reason}; "
            f"correct the name, go online, or download {shape} and give task.path"
        ) from error
    entries = [dict(row) for row in loaded]
    return identity.digest(json.dumps(entries, sort_keys=True, default=str)), entries


def file_bytes(path: Path) -> bytes:
    """What a file holds. Raises: ConfigError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"task.path={path} cannot be read: {error.strerror or error}; mend its permissions, or give another file") from error


def existing(path: str | Path, shape: str) -> Path:
    """The path of a file that is there. Raises: ConfigError."""
    found = Path(path).expanduser()
    if not found.is_file():
        raise ConfigError(f"task.path={path} {'is a folder' if found.is_dir() else 'does not exist'}; give {shape}, or task.dataset=HUB_ID")
    return found


def mapping_of(value: Any, where: str) -> Mapping[str, Any]:
    """An object with named fields. Raises: ConfigError."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: wanted an object with named fields, got {show(value)}")
    return value


def text_of(entry: Mapping[str, Any], key: str, where: str, default: str | None = None, shown: str = "") -> str:
    """A field that holds a text, stripped; `default` stands for a missing or empty one."""
    value = entry.get(key)
    place = f"{where}.{shown or key}"
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise ConfigError(f"{place}: wanted a text, got {show(value)}")
    if len(value) > LIMITS[key]:
        raise ConfigError(f"{place}: wanted at most {LIMITS[key]} characters, got {len(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{place}: not a valid text ({error.reason} at character {error.start})") from error
    if not value.strip() and default is None:
        raise ConfigError(f"{place}: wanted a text, got an empty one")
    return value.strip()


def show(value: Any) -> str:
    """A value as a message shows it."""
    if value is None:
        return "nothing"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:60] + '…'} ({type(value).__name__})"
