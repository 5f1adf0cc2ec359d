"""The whole battery once more, as an ordinary user who makes user namespaces: only where root may become one, and the system has a Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SYSTEM = "/usr/bin/python3"
USER = 12_345


def _system_version() -> str:
    return subprocess.run([SYSTEM, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, text=True).stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="the battery has run as an ordinary user already")
@pytest.mark.skipif(not os.path.exists(SYSTEM) or shutil.which("unshare") is None, reason="there is no Python that another user may run")
def test_the_battery_as_an_ordinary_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    if _system_version() != str(sys.version_info[:2]):
        pytest.skip("the system's Python is another version than the environment's")
    packages = next(p for p in sys.path if p.endswith("site-packages"))
    here = Path(__file__).parent
    base = Path("/tmp") / f"ordinary-{os.getpid()}"
    base.mkdir()
    os.chown(base, USER, USER)
    try:
        done = subprocess.run(
            [SYSTEM, "-m", "pytest", "-q", "-x", str(here / "test_hostile.py"), "-p", "no:cacheprovider", f"--basetemp={base / 'tests'}"],
            cwd=base,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{here.parents[1]}:{packages}", "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(base)},
            user=USER,
            group=USER,
            extra_groups=[],
            capture_output=True,
            text=True,
        )
    finally:
        shutil.rmtree(base)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
