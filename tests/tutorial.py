"""The tutorial as a program: its files and its commands, in their order. ``python tests/tutorial.py`` writes the files into the text again."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from selfimprove.scaffold import create

TOP = Path(__file__).parent.parent
TUTORIAL = TOP / "docs" / "write_a_plugin.md"
PLUGIN = TOP / "plugins" / "prompt_evolution"
OURS, THEIRS = "selfimprove_prompt_evolution", "prompt_evolution"
"""What the package is called here, and by somebody who follows the tutorial."""
_BLOCK = re.compile(r'^```(?P<language>\w+)(?: title="(?P<title>[^"]*)")?\n(?P<text>.*?)^```$', flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: a file where its title is a path, commands where its language is bash."""

    language: str
    title: str
    text: str

    @property
    def is_file(self) -> bool:
        return "." in self.title and " " not in self.title


def blocks() -> list[Block]:
    found = _BLOCK.finditer(TUTORIAL.read_text(encoding="utf-8"))
    return [Block(m["language"], m["title"] or "", m["text"]) for m in found]


def source(title: str) -> str:
    """What a file of the tutorial holds: the plugin's own, by another name; or what `selfimprove new` writes."""
    if title.startswith("terse/"):
        with tempfile.TemporaryDirectory() as folder:
            create("terse", ["middleware", "observer"], Path(folder))
            return (Path(folder) / title).read_text(encoding="utf-8")
    path = PLUGIN / title.replace(f"src/{THEIRS}/", f"src/{OURS}/")
    return path.read_text(encoding="utf-8").replace(OURS, THEIRS)


def written(text: str) -> str:
    """The tutorial with its files as they are."""

    def block(m: re.Match[str]) -> str:
        one = Block(m["language"], m["title"] or "", m["text"])
        return f'```{one.language} title="{one.title}"\n{source(one.title)}```' if one.is_file else m[0]

    return _BLOCK.sub(block, text)


if __name__ == "__main__":
    TUTORIAL.write_text(written(TUTORIAL.read_text(encoding="utf-8")), encoding="utf-8")
