"""Observers that show or log a run: a progress display, and three experiment trackers through their own packages."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from selfimprove.errors import ConfigError
from selfimprove.hooks import hookimpl
from selfimprove.identity import digest
from selfimprove.ledger import Ledger
from selfimprove.records import Evaluation, Lineage
from selfimprove.run import Run
from selfimprove.statistics import reward_statistics
from selfimprove.storage import read_lines

TOKENS = ("generated_tokens", "scored_tokens", "trained_tokens")
BRIEF = 0.5
"""Seconds below which a stage is not worth a plain line."""
BLINK = 0.1
"""Seconds between two drawings of the live line."""


def measurements(lineage: Lineage, ledger: Ledger) -> dict[str, float]:
    """What a tracker logs of the last round, by name: rewards, scores, the means of all their metrics, the rewards' statistics, and the ledger."""
    last = lineage.round(-1)
    scores = [e for _, e in last.scores]
    return {
        "candidates": float(lineage.size),
        "trials": float(len(last.trials)),
        **_summary("reward", last.rewards),
        **_summary("score", scores),
        **{f"reward/{name}": value for name, value in reward_statistics(last.trials, last.rewards).items()},
        **{f"ledger/{unit}": float(amount) for unit, amount in ledger.totals.items()},
    }


def _summary(name: str, evaluations: Sequence[Evaluation]) -> dict[str, float]:
    values = [e.score for e in evaluations if e.score is not None and math.isfinite(e.score)]
    found = {f"{name}/measured": float(len(values))}
    if values:
        found |= {f"{name}/mean": mean(values), f"{name}/best": max(values)}
    for metric in sorted({m for e in evaluations for m in e.metrics}):
        numbers = [v for e in evaluations if (v := e.metrics.get(metric)) is not None and math.isfinite(v)]
        if numbers:
            found[f"{name}/{metric}"] = mean(numbers)
    return found


class PatientConsole(Console):
    """A console on standard error that raises where its pipe is broken; rich would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        raise BrokenPipeError("nobody reads the progress")


class Progress:
    """A live line for the stage at work; one plain line per stage (of some length) where the output is no terminal.

    It shows the round, the stage, the work done of all, the mean reward of the last round, tokens per second, and the
    time that the stage took and will take. An output that breaks (a closed pipe, an encoding without the characters)
    silences it and leaves the run alone.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or PatientConsole(stderr=True)
        self._bars: Bars | None = None
        self._round = 0
        self._stage = ""
        self._done = self._total = 0
        self._reward = ""
        self._begun = 0.0
        self._tokens = 0.0
        self._broken = False
        self._drawn = 0.0

    @hookimpl
    def setup(self, run: Run) -> None:
        self._round = _rounds_done(run.folder) + 1
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[reward]}"),
                TextColumn("{task.fields[speed]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bars = Bars(*columns, console=self.console, transient=True, auto_refresh=False)  # no thread of its own, whose errors nobody catches

    @hookimpl
    def progress(self, stage: str, done: int, total: int, run: Run) -> None:
        tokens = sum(run.ledger.totals[u] for u in TOKENS)
        if stage != self._stage:
            self._finish(tokens)
            self._stage, self._begun, self._tokens = stage, time.monotonic(), tokens
        self._done, self._total = done, total
        if self._bars is not None:
            self._show(tokens)

    @hookimpl
    def round_finished(self, lineage: Lineage, run: Run) -> None:
        self._finish(sum(run.ledger.totals[u] for u in TOKENS))
        self._stage = ""
        found = measurements(lineage, run.ledger)
        mean, best, score = (found.get(name) for name in ("reward/mean", "reward/best", "score/mean"))
        self._reward = "" if mean is None else f"reward {mean:.3g}"
        parts = [f"round {len(lineage)}: {len(lineage.round(-1).trials)} trials"]
        parts += [] if mean is None else [f"reward {mean:.3g} (best {best:.3g})"]
        parts += [] if score is None else [f"score {score:.3g}"]
        self._say(", ".join(parts))
        self._round = len(lineage) + 1

    @hookimpl
    def teardown(self, run: Run) -> None:
        self._finish(sum(run.ledger.totals[u] for u in TOKENS))
        self._stage = ""
        if self._bars is not None:
            self._guarded(self._bars.stop)

    def _finish(self, tokens: float) -> None:
        """Close the stage at work: a plain line for it where there is no live display."""
        seconds = time.monotonic() - self._begun
        if self._stage and self._bars is None and seconds >= BRIEF:
            work = f" {self._done}/{self._total}," if self._done else ""
            self._say(f"round {self._round} {self._stage}:{work} {seconds:.1f} s{_speed(tokens - self._tokens, seconds, ', ')}")

    def _show(self, tokens: float) -> None:
        bars, now = self._bars, time.monotonic()
        assert bars is not None
        if now - self._drawn < BLINK:
            return
        self._drawn = now
        speed = _speed(tokens - self._tokens, now - self._begun)
        description = f"round {self._round} {escape(self._stage)}"

        def draw() -> None:
            if not bars.tasks:
                bars.start()
                bars.add_task(description, total=self._total, reward=self._reward, speed=speed)
            task = bars.tasks[0]
            if task.description != description or task.total != self._total:
                bars.reset(task.id, total=self._total, description=description)
            bars.update(task.id, completed=self._done, reward=self._reward, speed=speed, refresh=True)

        self._guarded(draw)

    def _say(self, text: str) -> None:
        self._guarded(lambda: self.console.print(text, markup=False, highlight=False, soft_wrap=True))

    def _guarded(self, draw: Any) -> None:
        if self._broken:
            return
        try:
            draw()
        except (OSError, ValueError):  # UnicodeEncodeError and writes to a closed file are ValueErrors
            self._broken = True


def _speed(tokens: float, seconds: float, before: str = "") -> str:
    return f"{before}{tokens / seconds:,.0f} tokens/s" if tokens and seconds > 0 else ""


def _rounds_done(folder: Path) -> int:
    """Rounds in the journal, whose first line is the root."""
    return max(0, sum(1 for _ in read_lines(folder / "journal.jsonl")) - 1)


class TensorBoard:
    """Event files that TensorBoard shows; in `folder`, or in ``tensorboard`` under the run folder."""

    def __init__(self, folder: str | Path | None = None) -> None:
        _need("tensorboard")
        self.folder = folder
        self._writer: Any = None

    @hookimpl
    def setup(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed process logged of a round that is not in the journal is hidden.
        self._writer = SummaryWriter(self.folder or run.folder / "tensorboard", purge_step=_rounds_done(run.folder) + 1)

    @hookimpl
    def round_finished(self, lineage: Lineage, run: Run) -> None:
        for name, value in measurements(lineage, run.ledger).items():
            self._writer.add_scalar(name, value, len(lineage))
        self._writer.flush()

    @hookimpl
    def teardown(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _Logger(Protocol):
    def log(self, metrics: dict[str, float], step: int) -> None: ...
    def finish(self) -> None: ...


class Trackio:
    """A run of a local trackio project; `trackio show --project …` opens its dashboard. Where it is kept: ``$TRACKIO_DIR``."""

    def __init__(self, project: str = "selfimprove") -> None:
        _need("trackio")
        self.project = project
        self._logger: _Logger | None = None

    @hookimpl
    def setup(self, run: Run) -> None:
        import trackio

        self._logger = trackio.init(
            project=self.project, name=_run_name(run), config=_described(run), resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
        )

    @hookimpl
    def round_finished(self, lineage: Lineage, run: Run) -> None:
        assert self._logger is not None
        self._logger.log(measurements(lineage, run.ledger), len(lineage))

    @hookimpl
    def teardown(self) -> None:
        if self._logger is not None:
            self._logger.finish()


class Wandb:
    """A Weights & Biases run; offline unless `mode` is ``online``. Keys come from the environment and are never written."""

    def __init__(self, project: str = "selfimprove", mode: str = "offline") -> None:
        _need("wandb")
        if mode not in ("offline", "online", "disabled"):
            raise ConfigError(f"observer wandb wants mode offline, online or disabled; got {mode!r}")
        self.project = project
        self.mode = mode
        self._logger: Any = None

    @hookimpl
    def setup(self, run: Run) -> None:
        import wandb

        name = _run_name(run)
        settings = wandb.Settings(save_code=False, disable_git=True, console="off")
        self._logger = wandb.init(
            project=self.project, name=name, id=name, resume="allow", mode=self.mode, dir=run.folder, config=_described(run), settings=settings
        )

    @hookimpl
    def round_finished(self, lineage: Lineage, run: Run) -> None:
        self._logger.log(measurements(lineage, run.ledger), step=len(lineage))

    @hookimpl
    def teardown(self) -> None:
        if self._logger is not None:
            self._logger.finish()


def _need(package: str) -> None:
    """Refuse before anything runs where a tracker's package is missing. Raises: ConfigError."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"observer {package} needs the package {package}, which is not installed; install it with `pip install 'selfimprove[{package}]'`"
        )


def _run_name(run: Run) -> str:
    """The same after a resume, and different for runs in folders of one name."""
    return f"{run.folder.name}-{digest(str(run.folder.resolve()))[:6]}"


def _described(run: Run) -> Mapping[str, Any]:
    """The run's identity: digests and settings that the run folder already holds, and no environment."""
    path = run.folder / "identity.json"
    identity: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return {**identity, "seed": run.seed, "task_name": run.task.name}
