"""The hooks of `mkdocs build`: pages that are written from code, documents that stand elsewhere in the repository, and their links."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

TOP = Path(__file__).parents[1]
sys.path.insert(0, str(TOP))  # mkdocs opens this file by its path

from docgen import commands, links, options, strategies  # noqa: E402

FIGURE = "six_verbs.svg"
RESULTS = TOP / "benchmarks" / "results"


def sources() -> dict[str, tuple[str, str]]:
    """Every page that is no file of `docs/`: its text, and the path in the repository that its links start from."""
    pages = {"strategies/index.md": (strategies.index(), "docs/strategies/index.md")}
    for folder in strategies.plugins():
        pages[f"strategies/{folder}.md"] = (strategies.page(folder), f"plugins/{folder}/README.md")
    pages["reference/options/index.md"] = (options.index(), "docs/reference/options/index.md")
    for group, found in options.groups().items():
        pages[f"reference/options/{group}.md"] = (options.page(group, found), f"docs/reference/options/{group}.md")
    pages["reference/commands.md"] = (commands.page(), "docs/reference/commands.md")
    for name, page in links.ALONE.items():
        if page != "index.md":
            pages[page] = ((TOP / name).read_text(encoding="utf-8"), name)
    return pages


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of `docs/`, and the others."""
    written = sources()
    for page, (text, _) in written.items():
        files.append(File.generated(config, page, content=text))
    for path in sorted((*RESULTS.glob("*.html"), *RESULTS.glob("*.svg"))):  # reports and figures, as they are
        files.append(File.generated(config, f"files/{path.name}", abs_src_path=str(path)))
    config.extra["sources"] = {page: source for page, (_, source) in written.items()}
    config.nav = _expanded(config.nav, [f.src_uri for f in files])
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The text with the site's links, and with the figure in it instead of beside it, where the theme colours it."""
    uri = page.file.src_uri
    known = frozenset(f.src_uri for f in files)
    moved = links.moved(markdown, config.extra["sources"].get(uri, f"docs/{uri}"), uri, known)
    before, image, after = moved.partition(f"]({FIGURE})")
    if not image:
        return moved
    drawing = (TOP / "docs" / FIGURE).read_text(encoding="utf-8")
    return f'{before.rpartition("![")[0]}<div class="figure">\n{drawing}</div>\n{after}'


def _expanded(nav: Any, pages: list[str]) -> Any:
    """The navigation with ``folder/*`` written out: the pages of a folder that are not named elsewhere."""
    named = set(_named(nav))

    def walk(node: Any) -> Any:
        if isinstance(node, list):
            return [entry for child in node for entry in (_folder(child) if isinstance(child, str) and child.endswith("/*") else [walk(child)])]
        return {title: walk(child) for title, child in node.items()} if isinstance(node, dict) else node

    def _folder(pattern: str) -> list[str]:
        folder = pattern.removesuffix("*")
        return sorted(p for p in pages if p.startswith(folder) and p.endswith(".md") and p not in named)

    return walk(nav)


def _named(node: Any) -> list[str]:
    if isinstance(node, str):
        return [node]
    children = node if isinstance(node, list) else node.values() if isinstance(node, dict) else ()
    return [name for child in children for name in _named(child)]
