"""Branches of a recorded run: going on from one of its rounds with something else, and scoring its trials anew."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from selfimprove import config as configuration
from selfimprove import runfolder
from selfimprove.config import Config
from selfimprove.errors import ConfigError, ResumeError
from selfimprove.identity import digest
from selfimprove.records import Evaluation, Lineage, encode_evaluation
from selfimprove.session import Session
from selfimprove.storage import append_line, place, read_lines, write_bytes, write_json

FORKED, REPLAYS, REPLAYED = "forked.json", "replays", "replayed.json"


def fork(folder: Path, rounds: int, overrides: Sequence[str], trust_env: bool = False) -> Session:
    """A session in a new run folder that has the first `rounds` rounds of another, and goes on with the overrides.

    Weights and finished pieces of work are linked to the old folder's, not computed again; the ledger goes on from what those rounds had
    spent.

    Raises: ConfigError, where the run has fewer rounds, its test has been opened, or an override would change the model, the task or the seed.
    """
    recorded = runfolder.recorded(folder)
    if (folder / runfolder.TEST).exists():
        raise ConfigError(f"{folder} was measured on its sealed test, and a branch of it would be chosen by that; start a new run")
    lines = list(read_lines(folder / runfolder.JOURNAL))
    if not 0 <= rounds < len(lines):
        raise ConfigError(f"--round wants a round of {folder}, 0 to {len(lines) - 1}; got {rounds}")
    changed = configuration.anchored(configuration.derived(recorded, overrides))
    _check_environment(changed, folder, trust_env)
    parts = configuration.build(changed)
    new = runfolder.fresh(changed)
    with _built(new) as made:
        _copy(folder, made)
        for line in lines[: rounds + 1]:
            append_line(made / runfolder.JOURNAL, line)
        write_json(made / FORKED, {"from": str(folder.absolute()), "round": rounds, "overrides": list(overrides)})
        runfolder.record(changed, made)
    return Session(parts, new)


@contextlib.contextmanager
def _built(new: Path) -> Iterator[Path]:
    """A folder beside a new run folder, which takes its place in the end: a kill leaves that one empty, or whole."""
    new = new.resolve()
    made = new.with_name(f".{new.name}.fork")
    shutil.rmtree(made, ignore_errors=True)  # left by a kill
    made.mkdir()
    try:
        yield made
        _put(made, new)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _put(made: Path, new: Path) -> None:
    """Let a folder take the place of one that holds nothing but what a kill left before a run began."""
    try:
        for left in new.iterdir():
            left.unlink()
        made.rename(new)
    except OSError as e:
        raise ConfigError(f"the run folder {new} cannot be made: {e.strerror or e}; choose another with run.folder=PATH") from e


@dataclass(frozen=True)
class Replay:
    """What another rewarder says of the trials that a run recorded."""

    file: Path
    rounds: list[dict[str, Any]]
    """For each round the number of ``trials``, the mean reward ``before`` and ``after``, and their rank ``correlation`` (or None)."""
    spent: Mapping[str, float]


def replay(folder: Path, overrides: Sequence[str], trust_env: bool = False) -> Replay:
    """The recorded trials of a run, rewarded by another rewarder; no edit is proposed or applied again.

    It works in a folder of its own under ``replays``, where every evaluation is written; the run itself stays as it is. Killed, it goes on; of a
    run that has gone on meanwhile, all trials are rewarded anew.

    Raises: ConfigError, where an override changes anything but the rewarder, the grader and the middleware; ResumeError.
    """
    recorded = runfolder.recorded(folder)
    keys = {str(o.key_or_group).split(".")[0] for o in configuration.parse(overrides)}
    if strange := sorted(keys - {"rewarder", "grader", "middleware"}):
        raise ConfigError(f"replay rewards recorded trials, so it takes rewarder=, grader= and middleware=; got {', '.join(strange)}")
    changed = configuration.anchored(configuration.derived(recorded, overrides))
    _check_environment(changed, folder, trust_env)
    parts = configuration.build(changed, only_measure=True)
    rounds_so_far = _journal(folder)
    work = folder / REPLAYS / digest({k: v for k, v in changed.recorded.items() if k != "run"}, hashlib.sha256(rounds_so_far).hexdigest())[:12]
    if not (work / runfolder.JOURNAL).exists():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        _copy(folder, work)
        write_bytes(work / runfolder.JOURNAL, rounds_so_far)
    session = Session(parts, work)
    try:
        before = dict(session.run.ledger.totals)
        lineage, rounds, lines = Lineage(session.lineage.root), [], []
        for one in session.lineage.rounds:
            rewards = session.hook.reward(trials=one.trials, lineage=lineage, run=session.run)
            rounds.append(_compared(one.rewards, rewards))
            lines.append([encode_evaluation(e) for e in rewards])
            lineage = lineage + one
        spent = {unit: total - before[unit] for unit, total in session.run.ledger.totals.items()}
        write_json(work / REPLAYED, {"overrides": list(overrides), "rounds": rounds, "rewards": lines, "spent": spent})
    finally:
        session.close()
    return Replay(work / REPLAYED, rounds, spent)


def _journal(folder: Path) -> bytes:
    """The journal of a run as it is now."""
    try:
        return (folder / runfolder.JOURNAL).read_bytes()
    except FileNotFoundError as e:
        raise ResumeError(f"{folder} has no round yet; go on with it (`selfimprove resume {folder}`)") from e


def _compared(old: Sequence[Evaluation], new: Sequence[Evaluation]) -> dict[str, Any]:
    pairs = [(a.score, b.score) for a, b in zip(old, new, strict=True) if a.finite and b.finite]
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    varied = len(set(before)) > 1 and len(set(after)) > 1
    return {
        "trials": len(old),
        "measured": len(pairs),
        "before": sum(before) / len(before) if before else None,  # type: ignore[arg-type]
        "after": sum(after) / len(after) if after else None,  # type: ignore[arg-type]
        "correlation": float(stats.spearmanr(before, after).statistic) if varied else None,
    }


def _copy(old: Path, new: Path) -> None:
    """What later rounds need of a run folder, its journal aside: finished tiles and blobs as links to the same files, the rest as copies."""
    for path in sorted([*(old / "tiles").rglob("*"), *(old / "blobs").rglob("*")]):
        if path.is_file():
            with contextlib.suppress(FileNotFoundError):  # pruned meanwhile
                place(path, new / path.relative_to(old))
    for path in (*old.glob("*.jsonl"), old / "split.json", old / "identity.json"):
        if path.exists() and path.name != runfolder.JOURNAL:
            shutil.copyfile(path, new / path.name)


def _check_environment(config: Config, folder: Path, trust_env: bool) -> None:
    if config.environment and not trust_env:
        raise ConfigError(
            f"the configuration of {folder} reads {', '.join(config.environment)} from your environment; if you trust it with that, add --trust-env"
        )


def rounds_of(result: Replay) -> list[str]:
    """The lines that show a replay."""
    lines = ["round  trials  reward before  reward after  rank correlation"]
    for number, one in enumerate(result.rounds, 1):
        values = [one["before"], one["after"], one["correlation"]]
        before, after, correlation = ("–" if v is None else f"{v:.4f}" for v in values)
        lines.append(f"{number:>5}  {one['trials']:>6}  {before:>13}  {after:>12}  {correlation:>16}")
    return lines
