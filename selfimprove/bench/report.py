"""The report of a benchmark: Markdown and one HTML file without a network, from its result alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from selfimprove.bench.verdicts import called, cautions, sentences
from selfimprove.storage import write_bytes


def write(result: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Write ``report.md`` and ``report.html``; the lines to show in a terminal."""
    write_bytes(folder / "report.md", markdown(result).encode())
    yield from sentences(result)
    yield from cautions(result)
    yield f"report {folder / 'report.md'}"


def markdown(result: Mapping[str, Any]) -> str:
    """The report as Markdown: verdicts, cautions, the table."""
    lines = [f"# {result['suite']}", "", str(result["about"]), "", *(f"- {s}" for s in sentences(result)), ""]
    lines += [*(f"- {s}" for s in cautions(result)), "", *table(result), ""]
    return "\n".join(lines)


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """The arms as a Markdown table, by task."""
    [unit] = result["budget"]
    yield f"| task | arm | sealed test | pass@k | {unit} | seeds |"
    yield "|---|---|---|---|---|---|"
    for a in result["arms"]:
        score = "–" if a["score"] is None else f"{a['score']:.3f}" + ("" if a["standard_error"] is None else f" ± {a['standard_error']:.3f}")
        spent = "–" if a["spent"] is None else f"{a['spent']:.3g}"
        done = sum(c["score"] is not None for c in a["cells"])
        yield f"| {a['task']} | {called(a['name'])} | {score} | {passed(a['metrics'])} | {spent} | {done} |"


def passed(metrics: Mapping[str, float]) -> str:
    """pass@k, for the largest k that was measured."""
    found = {int(k): v for m, v in metrics.items() if (k := m.removeprefix("pass_at_")).isdigit() and m.startswith("pass_at_") and k != "1"}
    return f"{found[max(found)]:.3f} (k = {max(found)})" if found else ""
