"""`run.sandbox` runs a program once, charges it each time, and refuses what it cannot trust."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from selfimprove.errors import ConfigError, StorageError
from selfimprove.ledger import Ledger
from selfimprove.sandbox import Limits, Program, Sandbox, Sandboxes, isolation

ASKS = Program({"main.py": 'import os\nos.write(3, b\'{"call": "score"}\\n\')\nos.write(3, b\'{"call": "answer", "value": 7}\\n\')\n'}, "main.py")


def test_a_program_runs_once_and_is_charged_each_time(tmp_path: Path) -> None:
    asked: list[str] = []
    ledgers = [Ledger(), Ledger()]
    for ledger in ledgers:

        def score(call: str, request: Mapping[str, Any], ledger: Ledger = ledger) -> int:
            asked.append(call)
            ledger.charge(scored_tokens=5)
            return 1

        assert Sandboxes(Sandbox("auto"), tmp_path, ledger).run(ASKS, score).answer == 7
    assert asked == ["score"]
    assert [x.totals["scored_tokens"] for x in ledgers] == [5, 5]
    assert ledgers[0].totals["cpu_seconds"] == ledgers[1].totals["cpu_seconds"]


def test_other_limits_input_or_salt_are_another_program(tmp_path: Path) -> None:
    box = Sandboxes(Sandbox("auto"), tmp_path, Ledger())
    for options in ({}, {"limits": Limits(processes=3)}, {"salt": 1}):
        box.run(ASKS, **options)
    assert len(list((tmp_path / "sandbox").rglob("*.json"))) == 3


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    box = Sandboxes(Sandbox("auto"), tmp_path, Ledger())
    box.run(ASKS)
    [path] = (tmp_path / "sandbox").rglob("*.json")
    path.write_text('{"outcome": {"status": "done", "colour": 1}, "answering": {}}')
    with pytest.raises(StorageError, match="delete it and resume"):
        box.run(ASKS)


def test_without_a_sandbox_nothing_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sandbox=auto"):
        Sandboxes(None, tmp_path, Ledger()).run(ASKS)


def test_a_tool_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="no bwrap and no unshare"):
        isolation("auto")
    with pytest.raises(ConfigError, match="apt-get install bubblewrap"):
        isolation("bubblewrap")
    with pytest.raises(ConfigError, match="auto, bubblewrap or unshare"):
        isolation("docker")


def test_a_tool_that_does_not_work_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that forbids namespaces: the tool starts, says no, and nothing runs without it."""
    for name in ("bwrap", "unshare"):
        fake = tmp_path / name
        fake.write_text("#!/bin/sh\necho 'No permissions to create new namespace' >&2\nexit 1\n")
        fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="No permissions to create new namespace"):
        Sandbox("auto")


@pytest.mark.parametrize("limit", ["cpu_seconds", "wall_seconds", "memory_mib", "processes", "disk_mib", "output_kib"])
def test_limits_are_positive(limit: str) -> None:
    with pytest.raises(ConfigError, match=f"sandbox.limits.{limit}"):
        Limits(**{limit: 0})
