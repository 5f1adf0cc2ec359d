"""Tiles on disk: what a finished piece of work said, what it cost, and the weights that it made.

A tile's metadata (texts, numbers, charges) is kept; the weights of a train tile are pruned by the retention rule. Adapters of the tiles that were
used last are in memory too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from selfimprove.errors import StorageError
from selfimprove.models import recipes
from selfimprove.models.api import Document, Interpolate, Lora, Objective, Pair, Prefer, Reinforce, Sample, Train
from selfimprove.models.shared import Shared, tile_path
from selfimprove.records import Part
from selfimprove.storage import write_bytes, write_json

if TYPE_CHECKING:
    from torch import Tensor

TRAINING = ("train", "reinforce", "prefer", "interpolate")
"""Calls that make weights."""
IN_MEMORY = 8
"""Train tiles whose adapters are kept in memory; the others are read from disk again."""
REPLAY = (
    ". Where a finished round rests on it, delete journal.jsonl and parts.jsonl too: the rounds are told again from the tiles that "
    "are left, and the rest is computed again"
)

Adapter = Mapping[str, "Tensor"]
"""LoRA weights by PEFT's names: ``base_model.model.<module>.lora_A.weight`` (rank, in) and ``…lora_B.weight`` (out, rank); where weights
move as a whole, what is added to each: ``<module>.weight`` (out, in)."""


class Tiles:
    """The tiles of a run folder.

    Args:
        folder: the run's.
        shared: tiles of other runs, where this run may find and leave some.
    """

    def __init__(self, folder: Path, shared: Shared | None = None) -> None:
        self.folder, self.shared = folder, shared
        self._cache: dict[str, Mapping[int, Adapter]] = {}
        self._outlines: dict[str, list[Any]] = {}
        self._fresh = [p.stem for p in sorted(folder.glob("tiles/*/*.safetensors"))]  # weights that are on disk and not yet ruled on

    # ---- what a tile says ----

    def find(self, call: str, name: str) -> bool:
        """Whether a tile is finished, here or by another run."""
        if self._path(name, "json").exists():
            return True
        if self.shared is None or not self.shared.take(name, self.folder, weights=call in TRAINING):
            return False
        if call in TRAINING:
            self._fresh.append(name)
        return True

    def finish(self, call: str, name: str, tile: Sequence[Any], rows: Sequence[Any], charges: Mapping[str, float], give: bool) -> None:
        """Record what a tile came to. Args: give: let other runs find it."""
        stored = {"call": call, "charges": charges, "results": [dataclasses.asdict(r) for r in rows]}
        if call in TRAINING:
            stored["requests"] = [dataclasses.asdict(r) for r in tile]
        write_json(self._path(name, "json"), stored)
        if self.shared is not None and give:
            self.shared.give(name, self.folder, weights=call in TRAINING)

    def finished(self, name: str, result: type[Any], count: int) -> tuple[list[Any], dict[str, float]]:
        """The results and charges of a tile that is on disk. Raises: StorageError."""
        path = self._path(name, "json")
        stored = read(path)
        try:
            rows = [result(**{**r, **{n: Part(**r[n]) for n in ("policy", "optimizer") if n in r}}) for r in stored["results"]]
            if len(rows) != count:
                raise ValueError(f"{len(rows)} results for {count} requests")
            return rows, dict(stored["charges"])
        except (KeyError, TypeError, ValueError) as e:
            raise unreadable(path, e) from e

    def derive(self, name: str, encoded: Sequence[Any]) -> None:
        """Record recipes, which cost nothing until they are used."""
        if not self._path(name, "json").exists():
            write_json(self._path(name, "json"), {"call": "derive", "requests": encoded})

    def requests(self, name: str) -> list[Any]:
        """What a tile that made parts was asked for. Raises: StorageError."""
        path = self._path(name, "json")
        try:
            stored = read(path, REPLAY)
            return [_DECODE[stored["call"]](r) for r in stored["requests"]]
        except (KeyError, TypeError) as e:
            raise unreadable(path, e, REPLAY) from e

    def outline(self, name: str) -> list[Any]:
        """The same without the texts that it trained on, which is little enough to be kept in memory for a whole run. Raises: StorageError."""
        if name not in self._outlines:
            self._outlines[name] = [_without_texts(r) for r in self.requests(name)]
        return self._outlines[name]

    # ---- the weights that a tile made ----

    def has_weights(self, name: str) -> bool:
        """Whether they are on disk."""
        return self._path(name, "safetensors").exists()

    def weights(self, name: str) -> Mapping[int, Adapter] | None:
        """The adapters of a tile by row, from memory or disk; None where they were pruned. Raises: StorageError."""
        if name not in self._cache:
            if not self.has_weights(name):
                return None
            self._remember(name, self.load(name))
        return self._cache[name]

    def put(self, name: str, adapters: Sequence[Adapter]) -> Mapping[int, Adapter]:
        """Write the adapters of a tile, and keep them in memory."""
        rows = dict(enumerate(adapters))
        self.write(name, rows)
        self._remember(name, rows)
        return rows

    def write(self, name: str, adapters: Mapping[int, Adapter]) -> None:
        """Write adapters of a tile by row."""
        packed = {f"{row}/{k}": v.contiguous() for row, a in adapters.items() for k, v in a.items()}
        write_bytes(self._path(name, "safetensors"), save_tensors(packed))
        if name not in self._fresh:
            self._fresh.append(name)

    def load(self, name: str) -> dict[int, Adapter]:
        """The adapters of a tile by row, from disk. Raises: StorageError."""
        path = self._path(name, "safetensors")
        try:
            packed = load_tensors(path.read_bytes())
            adapters: dict[int, dict[str, Tensor]] = {}
            for key, value in packed.items():
                row, weight = key.split("/", 1)
                adapters.setdefault(int(row), {})[weight] = value
        except (OSError, ValueError, SafetensorError) as e:
            raise unreadable(path, e) from e
        return dict(adapters)

    def prune(self, wanted: set[str]) -> None:
        """Forget the weights of all tiles but these; those that were kept once are kept."""
        for name in self._fresh:
            if name not in wanted:
                self._path(name, "safetensors").unlink(missing_ok=True)
                self._cache.pop(name, None)
        self._fresh = [t for t in self._fresh if t in wanted]

    def _remember(self, name: str, adapters: Mapping[int, Adapter]) -> None:
        self._cache[name] = adapters
        while len(self._cache) > IN_MEMORY:
            del self._cache[next(iter(self._cache))]

    def _path(self, name: str, suffix: str) -> Path:
        return tile_path(self.folder, name, suffix)


def read(path: Path, remedy: str = "") -> dict[str, Any]:
    """What a file of the model layer says. Raises: StorageError."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as e:
        raise unreadable(path, e, remedy) from e


def unreadable(path: Path, e: Exception, remedy: str = "") -> StorageError:
    return StorageError(f"tile {path} cannot be read ({e}); delete that file and resume, and it is computed again{remedy}")


# ---- requests, as they were written ----


def _without_texts(request: Any) -> Any:
    match request:
        case Train():
            return dataclasses.replace(request, documents=())
        case Reinforce():
            return dataclasses.replace(request, samples=())
        case Prefer():
            return dataclasses.replace(request, pairs=())
    return request


def _decode_train(data: Mapping[str, Any]) -> Train:
    return Train(
        policy=Part(**data["policy"]),
        documents=tuple(Document(**d) for d in data["documents"]),
        lora=_decode_lora(data["lora"]),
        seed=data["seed"],
    )


def _decode_reinforce(data: Mapping[str, Any]) -> Reinforce:
    return Reinforce(
        policy=Part(**data["policy"]),
        samples=tuple(_decode_sample(s) for s in data["samples"]),
        lora=_decode_lora(data["lora"]),
        objective=Objective(**data["objective"]),
        optimizer=Part(**data["optimizer"]) if data["optimizer"] else None,
        seed=data["seed"],
    )


def _decode_prefer(data: Mapping[str, Any]) -> Prefer:
    return Prefer(
        policy=Part(**data["policy"]),
        reference=Part(**data["reference"]),
        pairs=tuple(Pair(**p) for p in data["pairs"]),
        lora=_decode_lora(data["lora"]),
        beta=data["beta"],
        seed=data["seed"],
    )


def _decode_interpolate(data: Mapping[str, Any]) -> Interpolate:
    return Interpolate(Part(**data["policy"]), Part(**data["towards"]), data["share"])


def _decode_sample(data: Mapping[str, Any]) -> Sample:
    lists: dict[str, Any] = {n: tuple(v) for n, v in data.items() if isinstance(v, list)}
    return Sample(**{**data, **lists})


def _decode_lora(data: Mapping[str, Any]) -> Lora:
    return Lora(**{**data, "targets": tuple(data["targets"])})


_DECODE: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "derive": recipes.decode,
    "train": _decode_train,
    "reinforce": _decode_reinforce,
    "prefer": _decode_prefer,
    "interpolate": _decode_interpolate,
}
