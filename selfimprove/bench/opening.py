"""Opening the sealed test: once, at the end, for all arms together, in a process that never trained.

    python -m selfimprove.bench.opening FOLDER [--trust-env]

Every opening is one line of ``openings.jsonl``, written before anything is read: when, which cells with which lineages, and which of them had been
measured before by somebody else (`selfimprove eval`). A second opening, and every cell that was peeked at, stands in the report. What a kill left of
an opening is no second one; a cell that was run anew since then is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from selfimprove import journal, runfolder, sealed
from selfimprove.bench.cells import DONE
from selfimprove.errors import SelfImproveError, StorageError
from selfimprove.storage import append_line, read_lines, write_json

OPENINGS = "openings.jsonl"
FAILURES = "test_failures.json"


def openings(out: Path) -> list[dict[str, Any]]:
    """Every opening of a benchmark's test, oldest first. Raises: StorageError."""
    try:
        return [dict(json.loads(line)) for line in read_lines(out / OPENINGS)]
    except (ValueError, TypeError) as e:
        raise StorageError(f"{out / OPENINGS} cannot be read ({e}); restore it from a copy: it says when the sealed test was opened") from e


def unmeasured(out: Path, keys: Mapping[str, str]) -> list[str]:
    """The finished cells whose test has not been measured by an opening, by key. Args: keys: state of each cell by key."""
    opened = _opened(out)

    def measured(key: str) -> bool:
        folder = out / "cells" / key
        return key in opened and (folder / runfolder.TEST).exists() and _same(opened[key], _lineage(folder))

    return [k for k, state in keys.items() if state == DONE and not measured(k)]


def open_test(out: Path, keys: Mapping[str, str], trust_env: bool = False) -> None:
    """Measure the test of every finished cell that has none yet; a cell that cannot be measured is noted and stops no other."""
    cells = unmeasured(out, keys)
    opened = _opened(out)
    lineages = {k: _lineage(out / "cells" / k) for k in cells}
    new = [k for k in cells if k not in opened or not _same(opened[k], lineages[k])]  # the others were left over by a kill
    if new:
        line = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "cells": new,
            "lineages": {k: lineages[k] for k in new},
            "peeked": [k for k in new if (out / "cells" / k / runfolder.TEST).exists()],
            "commit": runfolder.git_commit(),
        }
        append_line(out / OPENINGS, json.dumps(line))
    failures: dict[str, str] = {}
    for key in cells:
        folder = out / "cells" / key
        try:
            if sealed.recorded(folder) is None:
                sealed.sealed_test(folder, trust_env=trust_env, root=False)
        except SelfImproveError as e:
            failures[key] = str(e)
    write_json(out / FAILURES, failures)


def _opened(out: Path) -> dict[str, str | None]:
    """The cells that an opening named, and the digest of the lineage that the last one measured; None where it did not say."""
    return {k: o.get("lineages", {}).get(k) for o in openings(out) for k in o["cells"]}


def _lineage(folder: Path) -> str | None:
    """The digest of the lineage that a cell's test measured, or would measure; None where that cannot be read."""
    try:
        test = sealed.recorded(folder)
        return str(test["lineage"]) if test else journal.lineage_digest(folder / runfolder.JOURNAL)
    except (SelfImproveError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _same(one: str | None, other: str | None) -> bool:
    """Whether two digests may be of one lineage."""
    return one == other or one is None or other is None


def main() -> None:
    """Open the test of the benchmark in a folder."""
    out = Path(sys.argv[1])
    cells = json.loads((out / "cells.json").read_text(encoding="utf-8"))
    open_test(out, cells, "--trust-env" in sys.argv[2:])


if __name__ == "__main__":
    main()
