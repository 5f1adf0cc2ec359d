"""Fresh environments, and wheels of copies of the source to install into them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

TOP = Path(__file__).parent.parent
CORE = ["selfimprove", "conf", "pyproject.toml", "README.md", "LICENSE"]
"""What a wheel of the core is made of."""


class Environment:
    """A fresh virtual environment that borrows this one's libraries, but nothing of the project."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False)
        self.bin = folder / "bin"
        borrowed = folder / "borrowed"
        borrowed.mkdir()
        for kind in ("purelib", "platlib"):
            for path in Path(sysconfig.get_paths()[kind]).iterdir():
                ours = path.name.lower().startswith(("selfimprove", "__editable__")) or path.suffix in (".pth", ".egg-link")
                if not ours and not (borrowed / path.name).exists():
                    (borrowed / path.name).symlink_to(path)
        site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        (site / "borrowed.pth").write_text(f"{borrowed}\n")

    def run(self, *command: str | Path, cwd: Path, expected: int = 0) -> str:
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        clean["PYTHONDONTWRITEBYTECODE"] = "1"
        done = subprocess.run([str(c) for c in (self.bin / command[0], *command[1:])], cwd=cwd, env=clean, capture_output=True, text=True)
        assert done.returncode == expected, f"{command} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def files(self) -> set[str]:
        """What lies in it, without what Python compiles."""
        return {str(p) for p in self.bin.parent.rglob("*") if "borrowed" not in p.parts and "__pycache__" not in p.parts}

    def pip(self, *arguments: str | Path) -> None:
        pip("--python", self.bin / "python", *arguments)


def pip(*arguments: str | Path) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def wheel(source: Path, into: Path) -> Path:
    """A wheel of a copy of the source, so that building leaves nothing in the tree."""
    before = set(into.glob("*.whl"))
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", into, source)
    [made] = set(into.glob("*.whl")) - before
    return made


def copied(paths: Sequence[str], to: Path) -> Path:
    to.mkdir()
    for name in paths:
        source = TOP / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
        else:
            shutil.copy(source, to / name)
    return to
