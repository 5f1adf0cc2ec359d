"""The pages of the strategies: the README of each plugin, its options and what was measured of it; and the list of all strategies."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

from docgen.options import anchor, groups
from docgen.results import MEASURED, table

TOP = Path(__file__).parents[1]


def plugins() -> dict[str, str]:
    """The distribution of each folder of `plugins/`, by the folder's name."""
    return {
        f.parent.name: str(tomllib.loads(f.read_text(encoding="utf-8"))["project"]["name"])
        for f in sorted((TOP / "plugins").glob("*/pyproject.toml"))
    }


def index() -> str:
    """The list of all strategies, with the page of the plugin that has each."""
    homes = {name: folder for folder, name in plugins().items()}
    rows = []
    for option in groups()["strategy"]:
        home = homes.get(option.source.distribution)
        page = f"[{home.replace('_', ' ')}]({home}.md)" if home else "the core"
        rows.append(f"| [`{option.name}`](../reference/options/strategy.md#{anchor(option)}) | {option.summary} | {page} |")
    return "\n".join(
        (
            "# Strategies",
            "",
            "`selfimprove run strategy=NAME` runs one, `--cfg job` prints what it would use, and every role of it can be exchanged "
            "([which goes with which](../pairings.md)). A plugin's page has the paper, the algorithm in one box, "
            "its settings, what was measured of it, and what was not reproduced.",
            "",
            "| strategy | what it is | described in |",
            "|---|---|---|",
            *rows,
            "",
        )
    )


def page(folder: str) -> str:
    """The page of one plugin: its README, then what is written from code and result files."""
    readme = (TOP / "plugins" / folder / "README.md").read_text(encoding="utf-8").rstrip()
    return "\n".join((readme, "", *_measured(folder), *_options(plugins()[folder])))


def _measured(folder: str) -> Iterator[str]:
    for file in MEASURED.get(folder, ()):
        path = TOP / "benchmarks" / "results" / file.name
        if path.is_file():
            yield f"## Measured: {file.title}"
            yield ""
            yield from table(json.loads(path.read_text(encoding="utf-8")), file)
            yield ""
            if (plot := path.with_suffix(".svg")).is_file():
                picture = f"![{file.title}](../files/{plot.name})"
                yield f'<div class="wide" markdown>[{picture}](../../{plot.relative_to(TOP)})</div>'
                yield ""
            yield f"From `benchmarks/results/{file.name}`, made by `{file.command}`; the [log](../../docs/log.md) says what it means."
            yield ""


def _options(distribution: str) -> Iterator[str]:
    """Every option that a distribution adds, with a link to all its values."""
    yield "## Options of this plugin"
    yield ""
    yield "| option | what it is |"
    yield "|---|---|"
    for group, options in groups().items():
        for option in options:
            if option.source.distribution == distribution:
                yield f"| [`{group}={option.name}`](../../conf/{group}#{anchor(option)}) | {option.summary} |"
    yield ""
