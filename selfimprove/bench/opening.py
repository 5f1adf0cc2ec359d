"""Opening the sealed test: once, at the end, for all arms together, in a process that never trained.

    python -m selfimprove.bench.opening FOLDER [--trust-env]

Every opening is one line of ``openings.jsonl``, written before anything is read: when, which cells, and which of them had been measured before by
somebody else (`selfimprove eval`). A second opening, and every cell that was peeked at, stands in the report.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from selfimprove import runfolder, sealed
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
    opened = {k for o in openings(out) for k in o["cells"]}
    measured = {k for k in keys if (out / "cells" / k / runfolder.TEST).exists()}
    return [k for k, state in keys.items() if state == DONE and not (k in opened and k in measured)]


def open_test(out: Path, keys: Mapping[str, str], trust_env: bool = False) -> None:
    """Measure the test of every finished cell that has none yet; a cell that cannot be measured is noted and stops no other."""
    cells = unmeasured(out, keys)
    before = openings(out)
    opened = {k for o in before for k in o["cells"]}
    new = [k for k in cells if k not in opened]  # the others were left over by a kill
    if new:
        peeked = [k for k in new if (out / "cells" / k / runfolder.TEST).exists()]
        line = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "cells": new, "peeked": peeked, "commit": runfolder.git_commit()}
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


def main() -> None:
    """Open the test of the benchmark in a folder."""
    out = Path(sys.argv[1])
    cells = json.loads((out / "cells.json").read_text(encoding="utf-8"))
    open_test(out, cells, "--trust-env" in sys.argv[2:])


if __name__ == "__main__":
    main()
