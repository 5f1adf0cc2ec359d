"""Puts the tables of benchmark results into the README, from their JSON.

    python benchmarks/readme_table.py            # writes
    python benchmarks/readme_table.py --check    # exit code 1 where the README says something else

Between the lines ``<!-- results FILE -->`` and ``<!-- end of results -->`` of README.md stands the table of that result of `selfimprove bench`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from selfimprove.bench.report import table
from selfimprove.bench.verdicts import summaries

ROOT = Path(__file__).parents[1]
PLACE = re.compile(r"(<!-- results (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def filled(readme: str) -> str:
    """The README with every table as its result file says."""

    def put(match: re.Match[str]) -> str:
        result = json.loads((ROOT / match[2]).read_text(encoding="utf-8"))
        return "\n".join([match[1], *table(result), "", *summaries(result), "", match[3]])

    return PLACE.sub(put, readme)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = filled(before)
    if options.check:
        sys.exit("README.md differs from its results; run python benchmarks/readme_table.py" if before != after else 0)
    path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
