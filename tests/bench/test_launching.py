"""Cells that a Hydra launcher runs: where they run changes, what they do does not."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from selfimprove.bench import launching
from selfimprove.bench.cells import DONE, FAILED, RUNNING, WAITING, How, read, states
from selfimprove.bench.matrix import Cell
from selfimprove.cli import main
from selfimprove.config import launcher
from selfimprove.errors import ConfigError
from selfimprove.journal import lineage_digest
from selfimprove.storage import write_json

CELLS = [Cell("a", "t", s, ("strategy=toy",), f"1e{s}") for s in range(3)]


def test_a_launcher_that_is_missing_is_named_with_what_brings_it() -> None:
    assert launcher(["basic"]) == ["hydra/launcher=basic"]
    with pytest.raises(ConfigError, match=r"installed: .*basic.*pip install 'selfimprove\[launchers\]'.*hydra-ray-launcher"):
        launcher(["slurm"])


def test_what_a_launcher_says_last_is_told_and_what_it_left_out_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = states(CELLS, tmp_path)
    done = {"state": DONE, "reason": "the budget is spent", "seconds": 1.0}
    (tmp_path / "cells").mkdir()
    (tmp_path / "0").write_text(json.dumps(done))
    (tmp_path / "1").write_text(json.dumps({**done, "state": RUNNING}))
    script = f"echo no such partition; cd {tmp_path}; cp 0 cells/1e0.json; cp 1 cells/1e1.json"
    write_json(found[2].record, {"state": FAILED, "reason": "an earlier try", "seconds": 0.0})
    monkeypatch.setattr(launching, "command", lambda *_: ["sh", "-c", script])
    launching.run(found, tmp_path, [], How())
    assert [s.state for s in found] == [DONE, FAILED, FAILED]
    assert all("ended without it (no such partition)" in s.reason for s in found[1:])
    again = states(CELLS, tmp_path)
    assert [s.state for s in again] == [WAITING] * 3, "there is no run folder"


def test_what_was_not_begun_in_time_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = states(CELLS, tmp_path)
    monkeypatch.setattr(launching, "command", lambda *_: ["true"])
    launching.run(found, tmp_path, [], How(), seconds=-1.0)
    assert [s.state for s in found] == [WAITING] * 3


def test_the_program_reads_its_orders_whatever_the_folder_is_called(tmp_path: Path) -> None:
    """With Hydra's own launcher, too late to begin: so it is quick."""
    out = tmp_path / 'a "b" = c'
    found = states(CELLS, out)
    launching.run(found, out, launcher(["basic"]), How(tiles=out / "tiles"), seconds=-1.0)
    assert [s.state for s in found] == [WAITING] * 3
    assert set(json.loads((out / "launched.json").read_text())["cells"]) == {"1e0", "1e1", "1e2"}
    assert "Error" not in (out / "launched.log").read_text()
    read(found[0])
    assert found[0].state == WAITING


def digests(out: Path) -> dict[str, str]:
    return {p.parent.name: lineage_digest(p) for p in out.glob("cells/*/journal.jsonl")}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain")
    assert main(["bench", *WORDS, "--out", str(out)]) == 0
    return out


WORDS = ["suite=smoke", "seeds=1", "nulls=[greedy,random_reward]"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "words"),
    [
        ("hydra_joblib_launcher", "joblib n_jobs=2"),
        ("hydra_submitit_launcher", "submitit_local timeout_min=5"),
        ("hydra_ray_launcher", "ray"),
    ],
)
def test_a_launcher_runs_the_cells_that_the_benchmark_would(plain: Path, tmp_path: Path, package: str, words: str) -> None:
    if importlib.util.find_spec(f"hydra_plugins.{package}") is None:
        pytest.skip(f"{package} is not installed")
    assert main(["bench", *WORDS, "--launcher", words, "--out", str(tmp_path)]) == 0
    assert digests(tmp_path) == digests(plain)
    found: dict[str, Any] = json.loads((tmp_path / "result.json").read_text())
    assert not found["failures"]
    assert all(c["score"] is not None for a in found["arms"] for c in a["cells"])


@pytest.mark.slow
def test_cells_that_shared_tiles_are_what_they_would_be_alone(plain: Path, tmp_path: Path) -> None:
    [null] = [c for a in json.loads((plain / "result.json").read_text())["arms"] if a["name"] == "random_reward" for c in a["cells"]]
    note = json.loads((plain / "cells" / f"{null['key']}.json").read_text())
    assert main(["run", *note["overrides"], f"run.folder={tmp_path / 'alone'}"]) == 0
    assert lineage_digest(tmp_path / "alone" / "journal.jsonl") == digests(plain)[null["key"]]
    linked = [p for p in (plain / "cells").rglob("tiles/*/*.json") if p.stat().st_nlink > 1]
    assert linked, "some of them are one file in two cells"
    assert not (plain / "tiles").exists(), "the store is gone when nobody needs it"
    names = {p.name for p in linked}
    tested = subprocess.run(["grep", "-rl", "test-", *map(str, linked)], capture_output=True, text=True).stdout
    assert names
    assert not tested
