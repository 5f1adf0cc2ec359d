"""The relative links of the repository's documents, as they have to be in the site."""

from __future__ import annotations

import posixpath
import re

FENCED = re.compile(r"(^```.*?^```$)", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")
ALONE = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "README.md": "index.md"}


def page_of(path: str, known: frozenset[str]) -> str | None:
    """The page that shows a path of the repository, or None. Args: known: the site's pages and files."""
    folder, _, rest = path.partition("/")
    match folder:
        case "docs":
            page = rest
        case "plugins":
            page = f"strategies/{rest.partition('/')[0] or 'index'}.md" if rest.count("/") <= 1 else ""
        case "conf":
            page = f"reference/options/{rest.partition('/')[0] or 'index'}.md"
        case "benchmarks":
            page = f"files/{posixpath.basename(rest)}"
        case _:
            page = ALONE.get(path, "")
    return page if page in known else None


def moved(text: str, source: str, page: str, known: frozenset[str]) -> str:
    """The text of a document with its links as its page needs them; a link that leads out of the site becomes its words.

    Args:
        text: Markdown.
        source: the document's path in the repository.
        page: the path of its page in the site.
        known: the site's pages and files.
    """

    def replaced(match: re.Match[str]) -> str:
        words, target = match[1], match[2]
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, hash_, anchor = target.partition("#")
        there = page_of(posixpath.normpath(posixpath.join(posixpath.dirname(source), path)), known)
        return f"[{words}]({posixpath.relpath(there, posixpath.dirname(page) or '.')}{hash_}{anchor})" if there else words

    return "".join(part if part.startswith("```") else LINK.sub(replaced, part) for part in FENCED.split(text))
