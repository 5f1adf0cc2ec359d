"""The program that a Hydra launcher starts once for each cell, on the machine that it chooses. The machines share the benchmark's folder.

    python -m selfimprove.bench.launched -m hydra/launcher=submitit_slurm hydra.launcher.partition=gpu +out=FOLDER "+cell='KEY','KEY'"

Nothing is asked of a launcher but to call `main` with every key: what there is to do stands in ``launched.json``, how it went in the cells' records.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import hydra

from selfimprove.bench import cells
from selfimprove.bench.matrix import Cell

ORDERS = "launched.json"


@hydra.main(config_path=None, version_base="1.3")
def main(asked: Any) -> None:
    """Run one cell, if it is not too late to begin."""
    out = Path(asked.out)
    orders = json.loads((out / ORDERS).read_text(encoding="utf-8"))
    if orders["until"] is not None and time.time() > orders["until"]:
        return
    cell = orders["cells"][asked.cell]
    tiles = Path(orders["tiles"]) if orders["tiles"] else None
    cells.perform(cells.state(Cell(**{**cell, "overrides": tuple(cell["overrides"])}), out), cells.How(trust_env=orders["trust_env"], tiles=tiles))


if __name__ == "__main__":
    main()
