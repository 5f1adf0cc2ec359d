"""What the documents say, works: every Python and shell block runs, every link leads somewhere."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import selfimprove
from selfimprove import hooks, loop
from selfimprove.cli import main

TOP = Path(__file__).parent.parent
TUTORIAL = TOP / "docs" / "write_a_plugin.md"  # tests/test_tutorial.py runs it
DOCUMENTS = sorted([*TOP.glob("*.md"), *TOP.glob("docs/**/*.md"), *TOP.glob("plugins/*/README.md")])


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def commands(document: Path) -> list[str]:
    lines = [line.partition("#")[0].strip() for block in blocks(document, "bash") for line in block.splitlines()]
    return [line for line in lines if line]


SIGNATURES = TOP / "docs" / "hooks.md"  # its blocks are signatures, which tests/test_hooks.py compares with the code
PYTHON = [pytest.param(b, id=f"{d.relative_to(TOP)}-{i}") for d in DOCUMENTS if d != SIGNATURES for i, b in enumerate(blocks(d, "python"))]
MAKE = sorted({c for d in DOCUMENTS for c in commands(d) if c.startswith("make ")})


@pytest.mark.parametrize("block", PYTHON)
def test_every_python_block_runs(block: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", block], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("command", MAKE)
def test_every_make_command_has_a_target(command: str) -> None:
    done = subprocess.run([*command.split(), "--dry-run"], cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_every_command_of_the_readme_runs_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    ours = [c.split() for c in commands(TOP / "README.md") if c.startswith("selfimprove ")]
    assert len(ours) >= 8
    for command in ours:
        code: object = 0
        with contextlib.suppress(SystemExit):
            code = main(command[1:])
        assert code == 0, f"{' '.join(command)}: {capsys.readouterr().err}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(TOP)))
def test_shell_blocks_hold_nothing_that_is_not_checked(document: Path) -> None:
    strange = [c for c in commands(document) if not c.startswith(("make ", "selfimprove ")) and document != TUTORIAL]
    assert not strange, f"{document.name} shows commands that no test runs: {strange}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(TOP)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(TOP)))
def test_no_path_of_somebody_s_machine(document: Path) -> None:
    assert not re.findall(r"(?<![\w.])/(?:home|root|work|Users)/", document.read_text(encoding="utf-8"))


def test_the_box_is_the_same_everywhere() -> None:
    def box(text: str) -> list[str]:
        return [re.sub(r"\s+", " ", line.strip()) for line in text.splitlines() if re.match(r"\s*[PETRCSL] = ", line)]

    expected = box(hooks.__doc__ or "")
    assert len(expected) == 7
    assert box(loop.improve.__doc__ or "") == expected
    assert box((TOP / "README.md").read_text(encoding="utf-8")) == expected


def test_the_changelog_knows_this_version() -> None:
    headings = re.findall(r"^## (.+)$", (TOP / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings
    assert selfimprove.__version__ in headings[0] or headings[0] == "Unreleased"
    assert any(selfimprove.__version__ in h for h in headings)


def test_decisions_are_numbered_and_say_why() -> None:
    files = sorted((TOP / "docs" / "decisions").glob("*.md"))
    assert [f.name[:4] for f in files] == [f"{i:04}" for i in range(1, len(files) + 1)]
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert text.startswith("# ")
        for part in ("**Decision.**", "**Why.**", "**What follows.**"):
            assert part in text, f"{file.name} has no {part}"
