"""Finished tiles that several runs find: arms of a benchmark begin with the same model, the same questions and the same seeds."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from selfimprove.storage import place


def tile_path(folder: Path, tile: str, suffix: str) -> Path:
    """Where a folder keeps a tile: what it says (``json``), or the weights that it made (``safetensors``)."""
    return folder / "tiles" / tile[:2] / f"{tile}.{suffix}"


class Shared:
    """A folder of finished tiles by digest, which covers all that they were computed from.

    Who finds a tile is charged what it costs to compute, since its charges are part of it. Files come by a link to a run's own, weights before
    what names them, so that runs beside one another see whole tiles or none. Nothing here is pruned; a folder that is deleted costs time and
    nothing else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self, tile: str, into: Path, weights: bool) -> bool:
        """Whether a tile was here; it is in the run folder `into` then. One that cannot be read is thrown away."""
        said, made = (tile_path(self.folder, tile, s) for s in ("json", "safetensors"))
        try:
            if not {"charges", "results"} <= set(json.loads(said.read_bytes())):
                raise ValueError("no tile")
            if weights:
                with safe_open(made, "pt"):  # refuses a file that is not as long as it says
                    place(made, tile_path(into, tile, "safetensors"))
            place(said, tile_path(into, tile, "json"))
        except FileNotFoundError:
            return False
        except (TypeError, ValueError, SafetensorError):
            for path in (said, made):
                with contextlib.suppress(OSError):
                    path.unlink()
            return False
        return True

    def give(self, tile: str, source: Path, weights: bool) -> None:
        """Share a tile of a run folder."""
        for suffix in (*(["safetensors"] if weights else []), "json"):
            place(tile_path(source, tile, suffix), tile_path(self.folder, tile, suffix))
