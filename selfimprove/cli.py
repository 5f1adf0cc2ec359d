"""The command line: what a user types, and nothing else. Every command imports what it needs when it runs."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfimprove import discovery
from selfimprove.errors import ContractError, SelfImproveError, UserError

if TYPE_CHECKING:
    from selfimprove.config import Config
    from selfimprove.session import Session

EPILOG = """options are overrides, as Hydra writes them:
  selfimprove run strategy=seal                                one strategy, everything else by default
  selfimprove run strategy=seal rewarder=log_likelihood seed=3 another rewarder, another seed
  selfimprove run strategy=seal guard.rounds.rounds=4          a value inside an option
  selfimprove run strategy=seal guard=[rounds,budget] guard.budget.labels=500
  selfimprove run strategy=seal --cfg job                      print the configuration, start nothing
  selfimprove run -m strategy=seal seed=0,1                    one run after the other, each in its own folder
"""
_MENDABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG)
"""What an operating system refuses because of a folder's permissions, space or name."""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 1 a plugin broke its contract or a check failed, 2 something the user can mend."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without the characters shows others
    parser = _parser()
    arguments, extra = parser.parse_known_args(argv)
    if strange := [e for e in extra if e.startswith("-") or "overrides" not in arguments]:
        arguments.parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if extra:  # overrides after an option, as in `run seed=1 -m strategy=seal`
        arguments.overrides = [*arguments.overrides, *extra]
    try:
        return int(arguments.command(arguments))
    except UserError as e:
        print(f"error: {clean(str(e))}", file=sys.stderr)
        return 2
    except ContractError as e:
        print(f"a plugin broke its contract: {clean(str(e))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `selfimprove list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        if e.errno not in _MENDABLE:
            raise
        where = f" ({clean(str(e.filename))})" if e.filename else ""
        print(f"error: {e.strerror}{where}; free the space, mend the permissions or choose another folder", file=sys.stderr)
        return 2


# ---- commands ----


def run(arguments: argparse.Namespace) -> int:
    """Compose, and run the loop: once, or once for each job of a multirun."""
    from selfimprove import config

    jobs = config.jobs(arguments.overrides) if arguments.multirun else [list(arguments.overrides)]
    configs = [config.compose(job) for job in jobs]  # all of them before the first starts
    if arguments.cfg:
        print("---\n".join(c.text() for c in configs), end="")
        return 0
    for composed in configs:
        config.check(composed)
    configs = [config.anchored(c) for c in configs]
    failed = 0
    for number, (job, composed) in enumerate(zip(jobs, configs, strict=True)):
        if len(jobs) == 1:
            _start(composed, number if arguments.multirun else None, arguments.tiles)
            continue
        print(f"job {number + 1} of {len(jobs)}: {' '.join(job)}")
        try:
            _start(composed, number, arguments.tiles)
        except SelfImproveError as e:  # one bad job does not take the others with it
            failed += 1
            print(f"error: job {number + 1}: {clean(str(e))}", file=sys.stderr)
    if failed:
        raise UserError(f"{failed} of {len(jobs)} jobs failed; what each said stands above")
    return 0


def resume(arguments: argparse.Namespace) -> int:
    """Go on with a run from its last finished piece of work."""
    from selfimprove import config, runfolder
    from selfimprove.models import processes
    from selfimprove.session import Session

    folder: Path = arguments.run
    if (folder / runfolder.TEST).exists():
        raise UserError(f"{folder} was measured on its sealed test, and a run does not go on after that; start a new one")
    processes.place()
    parts = config.build(runfolder.trusted(folder, arguments.trust_env))
    with processes.led(parts.engine) as here:
        if not here:
            return 0
        session = Session(parts, folder, shared=runfolder.shared(arguments.tiles))
        print(f"resuming {folder} after {len(session.lineage)} rounds")
        return _improve(session)


def show(arguments: argparse.Namespace) -> int:
    """Rounds, edits, ledger and lineage of a run; or one candidate's edits, from the first on; or the lineage as a page."""
    from rich.console import Console

    from selfimprove import runfolder
    from selfimprove.report import history, lineage_page, render_chain, render_run
    from selfimprove.storage import write_bytes

    if arguments.html:
        write_bytes(arguments.html, lineage_page(history(arguments.run)).encode())
        print(f"the lineage is in {arguments.html}; open it in a browser")
    elif arguments.candidate:
        run_ = history(arguments.run)
        render_chain(run_, runfolder.candidate(run_.lineage, arguments.candidate), Console())
    else:
        render_run(arguments.run, Console())
    return 0


def catalogue(arguments: argparse.Namespace) -> int:
    """Everything that is installed, with its distribution and version."""
    groups = {o.group for s in discovery.sources() for o in s.options()}
    if arguments.group and arguments.group not in groups:
        raise UserError(f"there is no group {arguments.group!r}{discovery.nearest(arguments.group, groups)} (groups: {', '.join(sorted(groups))})")
    for line in _catalogue(arguments.group):
        print(line)
    return 0


def plan(arguments: argparse.Namespace) -> int:
    """What a run would cost; starts nothing."""
    from selfimprove import config
    from selfimprove.plan import planned

    composed = config.compose(arguments.overrides)
    config.check(composed)
    for line in planned(composed):
        print(line)
    return 0


def bench(arguments: argparse.Namespace) -> int:
    """Arms × tasks × seeds at one budget, with null arms, statistics and a report."""
    from rich.console import Console

    from selfimprove.bench.command import bench as compared
    from selfimprove.bench.command import listed, merge

    a = arguments
    if a.dry_run:
        for line in listed(a.overrides):
            print(clean(line))
        return 0
    if a.merge:
        print(f"benchmark {merge([Path(p) for p in a.overrides], a.out, Console())}")
        return 0
    how = {"jobs": a.jobs, "launch": a.launch, "launcher": a.launcher, "hours": a.hours, "open_anyway": a.open, "trust_env": a.trust_env}
    folder = compared(a.overrides, a.out, Console(), **how)
    print(f"benchmark {folder}")
    return 0


def runs(arguments: argparse.Namespace) -> int:
    """Past runs and cells, filtered and sorted, or two of them compared."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from selfimprove import past

    a = arguments
    table = Table(box=None, header_style="bold", pad_edge=False)
    if a.compare:
        pair = [past.row(folder) for folder in a.compare]
        if broken := [r for r in pair if "unreadable" in r]:
            raise UserError(f"{broken[0]['run']} is no run that can be read ({broken[0]['unreadable']}); name two run folders")
        entries = past.compared(*pair)
        headings = ["", *map(str, a.compare)]
        lines = [[k, *map(_cell, v)] for k, *v in entries if k != "run"]
    else:
        found = past.chosen(list(past.rows(a.root)), a.overrides, a.sort)
        named = [re.split(r"[!<>=]", f)[0] for f in a.overrides] + ([a.sort.removeprefix("-")] if a.sort else [])
        if any(r.get(past.TRANSDUCTIVE) for r in found):
            named.append(past.TRANSDUCTIVE)
        headings = list(dict.fromkeys((*past.COLUMNS, *named)))
        lines = [[_cell(r.get("unreadable") if h == "strategy" and "unreadable" in r else r.get(h)) for h in headings] for r in found]
        if not lines:
            raise UserError(f"no run under {a.root} passes; `selfimprove runs --root DIR` looks elsewhere")
    for heading in headings:
        table.add_column(Text(clean(heading)), overflow="fold")
    for line in lines:
        table.add_row(*(Text(clean(c)) for c in line))
    Console().print(table)
    return 0


def fork(arguments: argparse.Namespace) -> int:
    """A new run from a round of another, with something changed."""
    from selfimprove.branch import fork as branched

    session = branched(arguments.run, arguments.round, arguments.overrides, arguments.trust_env)
    print(f"{session.folder} goes on from round {arguments.round} of {arguments.run}")
    return _improve(session)


def replay(arguments: argparse.Namespace) -> int:
    """The recorded trials of a run, rewarded anew."""
    from selfimprove.branch import replay as rewarded
    from selfimprove.branch import rounds_of

    found = rewarded(arguments.run, arguments.overrides, arguments.trust_env)
    for line in rounds_of(found):
        print(line)
    print(f"every evaluation is in {found.file}")
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """The sealed test: measured once, recorded, then printed."""
    from selfimprove.sealed import recorded, sealed_test, table

    known = recorded(arguments.run)
    if known is not None:
        print(f"{arguments.run} was measured on its sealed test before, and that happens once; the recorded result:")
    for line in table(known if known is not None else sealed_test(arguments.run, arguments.unfinished, arguments.trust_env)):
        print(line)
    return 0


def export(arguments: argparse.Namespace) -> int:
    """A candidate's weights, for peft or transformers; of a candidate that has code, its code."""
    from selfimprove import runfolder
    from selfimprove.code import CodeStore
    from selfimprove.export import export as write
    from selfimprove.export import export_code
    from selfimprove.report import history

    written = runfolder.candidate(history(arguments.run).lineage, arguments.candidate)
    if "code" in written.parts and not (arguments.merged or arguments.adapter):
        export_code(CodeStore(arguments.run).get(written.parts["code"]), arguments.destination)
        print(f"the code of candidate {written.id[:12]} is in {arguments.destination}; nobody has read it, so run it in a sandbox")
        return 0
    _, session = runfolder.opened(arguments.run, only_measure=True, trust_env=arguments.trust_env)
    try:
        chosen = runfolder.candidate(session.lineage, arguments.candidate)
        merged = True if arguments.merged else False if arguments.adapter else None
        write(session.run.models, chosen, arguments.destination, merged)
    finally:
        session.close()
    print(f"candidate {chosen.id[:12]} is in {arguments.destination}")
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """Whether this machine is ready; every failing row prints its fix."""
    from selfimprove.doctor import rows

    found = list(rows())
    width = max(len(r.name) for r in found)
    for row in found:
        print(clean(f"{row.mark:<4} {row.name:<{width}}  {row.value}"))
        if row.fix:
            print(clean(f"     {'':<{width}}  fix: {row.fix}"))
    return 1 if any(r.mark == "fail" for r in found) else 0


def new(arguments: argparse.Namespace) -> int:
    """A new plugin, as a package of its own."""
    from selfimprove.scaffold import create

    folder = create(arguments.name, [r.strip() for r in arguments.roles.split(",") if r.strip()], arguments.into)
    print(f"{folder} is a plugin. Go on with:\n")
    print(f"  pip install -e '{folder}[dev]'\n  pytest {folder}\n  selfimprove run strategy={arguments.name}")
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Whether an installed plugin keeps what its users may expect, as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from selfimprove.check import rows

    table, failed = Table("", "what", "seconds", "what it means", title=f"selfimprove check {arguments.package}"), 0
    chosen = [arguments.strategy] if arguments.strategy else None
    with Console(stderr=True).status("…") as status:
        for row in rows(arguments.package, chosen, announce=lambda what: status.update(Text(clean(what)))):
            failed += not row.passed
            table.add_row("ok" if row.passed else "FAIL", Text(clean(row.what)), f"{row.seconds:.1f}", Text(clean(row.message)))
    Console().print(table)
    print(f"{failed} of {table.row_count} checks failed" if failed else f"all {table.row_count} checks passed")
    return 1 if failed else 0


def completion(arguments: argparse.Namespace) -> int:
    """The completion script of a shell."""
    from selfimprove.completion import script

    print(script(arguments.shell, list(arguments.commands), _words()))
    return 0


# ---- pieces ----


def _start(composed: Config, job: int | None, tiles: Path | None) -> None:
    from selfimprove import config, runfolder
    from selfimprove.models import processes
    from selfimprove.session import Session

    processes.place()
    parts = config.build(composed)
    with processes.led(parts.engine) as here:
        if here:
            folder = runfolder.fresh(composed, job)
            runfolder.record(composed, folder)
            with _resumable(folder):
                session = Session(parts, folder, shared=runfolder.shared(tiles))
            _improve(session)


def _improve(session: Session) -> int:
    from rich.console import Console

    from selfimprove.journal import lineage_digest
    from selfimprove.report import closing_table, history, rewards_table

    folder = session.folder
    with _resumable(folder):
        lineage = session.improve()
    reason = session.hook.should_stop(lineage=lineage, run=session.run)
    console = Console()
    console.print(closing_table(folder))
    if (rewards := rewards_table(history(folder))) is not None:
        console.print(rewards)
    print(f"stopped because {reason}")
    print(f"lineage {lineage_digest(folder / 'journal.jsonl')}")
    print(f"run folder {folder}")
    return 0


@contextlib.contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """A stretch of a run; where it is stopped, the user learns how to go on."""
    try:
        yield
    except (KeyboardInterrupt, SelfImproveError, OSError):
        print(f"stopped; nothing that was finished is lost: `selfimprove resume {folder}`", file=sys.stderr)
        raise


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _catalogue(only: str | None = None) -> Iterator[str]:
    """One line for each option of each group, then what is broken."""
    found = discovery.sources()
    options = sorted((o for s in found for o in s.options() if o.group), key=lambda o: (_place(o.group), o.group, o.name))
    counts: dict[tuple[str, str], list[str]] = {}
    for option in options:
        counts.setdefault((option.group, option.name), []).append(option.source.distribution)
    shown = [o for o in options if only in (None, o.group)]
    names = max((len(o.name) for o in shown), default=0)
    origins = max((len(_origin(o.source)) for o in shown), default=0)
    faults = {s.package: s.broken() for s in found}
    group = ""
    for option in shown:
        if option.group != group:
            group = option.group
            yield f"{group}:"
        owners = counts[(option.group, option.name)]
        double = f"offered by {' and by '.join(owners)}; uninstall one" if len(owners) > 1 else None
        reason = double or faults[option.source.package] or option.broken()
        note = f"BROKEN: {reason}" if reason else option.summary
        yield clean(f"  {option.name:<{names}}  {_origin(option.source):<{origins}}  {note}".rstrip())
    for source in found:
        if faults[source.package] and not any(o.source is source for o in options):
            yield clean(f"BROKEN: {_origin(source)}: {faults[source.package]}")


_ORDER = (
    "strategy",
    "selector",
    "editor",
    "rewarder",
    "updater",
    "evaluator",
    "task",
    "model",
    "engine",
    "grader",
    "sandbox",
    "guard",
    "observer",
    "middleware",
)


def _place(group: str) -> int:
    return _ORDER.index(group) if group in _ORDER else len(_ORDER)


def _origin(source: discovery.Source) -> str:
    return f"{source.distribution} {source.version}"


def _words() -> list[str]:
    return sorted({f"{o.group}={o.name}" for s in discovery.sources() for o in s.options() if o.group})


def clean(text: str) -> str:
    """The text without control characters, which a plugin or a model could use to write over the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


class _Parser(argparse.ArgumentParser):
    """A parser whose help ends with every installed option, read when it is asked for."""

    lists_options = False

    def format_help(self) -> str:
        text = super().format_help()
        return (
            f"{text}\ninstalled options, and the distribution that provides each:\n" + "\n".join(_catalogue()) + "\n" if self.lists_options else text
        )


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="selfimprove", description="Self-improvement strategies for language models.", epilog=EPILOG, formatter_class=raw)
    parser.lists_options = True
    parser.add_argument("--version", action="version", version=f"selfimprove {discovery.version_of('selfimprove')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, command: Callable[[argparse.Namespace], int], summary: str, **more: Any) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary, formatter_class=raw, **more)
        sub.set_defaults(command=command, parser=sub, commands=commands.choices)
        return sub

    def add_run(p: argparse.ArgumentParser, opens: bool = True) -> None:
        p.add_argument("run", type=Path, metavar="RUN", help="a run folder")
        if opens:
            p.add_argument("--trust-env", action="store_true", help="let its configuration read the variables that it names, such as a judge's key")

    p = add("run", run, "start a run", epilog=EPILOG)
    p.lists_options = True  # type: ignore[attr-defined]
    p.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="group=option or key=value")
    p.add_argument("-m", "--multirun", action="store_true", help="run every combination of key=a,b, each in its own folder")
    p.add_argument("--cfg", choices=["job"], help="print the configuration and start nothing")
    share: dict[str, Any] = {"type": Path, "metavar": "DIR", "help": "finished work that runs share: what is found is charged, not computed"}
    p.add_argument("--tiles", **share)
    p = add("resume", resume, "go on with a run")
    add_run(p)
    p.add_argument("--tiles", **share)
    p = add("list", catalogue, "what is installed: strategies, roles, tasks, models …")
    p.add_argument("group", nargs="?", metavar="GROUP", help="only this group")
    p = add("show", show, "rounds, best and worst edits, ledger and lineage of a run")
    add_run(p, opens=False)
    p.add_argument("candidate", nargs="?", metavar="CANDIDATE", help="root, latest, best or the beginning of an id: the edits that led to it")
    p.add_argument("--html", type=Path, metavar="FILE", help="write the lineage as one page for a browser")
    p = add("plan", plan, "measure speed on a few batches and print what a run would cost; starts nothing")
    p.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as for run")
    p = add("bench", bench, "compare strategies at one budget, with null arms, statistics and a report")
    p.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="suite=NAME, or arms=[a,b] task=NAME seeds=5 budget.flops=1e15")
    p.add_argument("--out", type=Path, metavar="DIR", help="the folder of the benchmark (runs/bench/SUITE)")
    p.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at a time")
    p.add_argument("--launch", default="", metavar="WORDS", help="what to put before each cell's command, such as 'srun -c 4'")
    p.add_argument(
        "--launcher", default="", metavar="WORDS", help="a Hydra launcher for the cells and its settings, such as 'submitit_slurm partition=gpu'"
    )
    p.add_argument("--hours", type=float, metavar="H", help="start no more cells after so long; the same command goes on later")
    p.add_argument("--dry-run", action="store_true", help="print the cells and their commands, and start nothing")
    p.add_argument("--merge", action="store_true", help="the words are folders of benchmarks of other seeds: make one report of them")
    p.add_argument("--open", action="store_true", help="open the sealed test although some cells failed")
    p.add_argument("--trust-env", action="store_true", help="let cells read the variables of the environment that they name")
    p = add("runs", runs, "past runs and cells of benchmarks: filtered, sorted, compared")
    p.add_argument("overrides", nargs="*", metavar="FILTER", help="strategy=srt, 'test>0.3', updater.keep!=2")
    p.add_argument("--root", type=Path, default=Path("runs"), metavar="DIR", help="where to look (runs)")
    p.add_argument("--sort", metavar="KEY", help="order by a column or a key of the configuration; --sort=-KEY is descending")
    p.add_argument("--compare", nargs=2, type=Path, metavar="RUN", help="print everything in which two runs differ")
    p = add("fork", fork, "go on from a round of a run with something changed, in a new folder")
    add_run(p)
    p.add_argument("--round", type=int, required=True, metavar="N", help="keep so many rounds")
    p.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="updater=NAME, guard.rounds.rounds=9 …")
    p = add("replay", replay, "reward a run's recorded trials anew, without generating them again")
    add_run(p)
    p.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="rewarder=NAME, grader=NAME …")
    p = add("eval", evaluate, "measure a run's sealed test, once")
    add_run(p)
    p.add_argument("--unfinished", action="store_true", help="also where no guard has stopped the run; it cannot be resumed afterwards")
    p = add("export", export, "write a candidate for peft or transformers, or its code")
    add_run(p)
    p.add_argument("candidate", metavar="CANDIDATE", help="root, latest, best or the beginning of an id")
    p.add_argument("destination", type=Path, metavar="DIR", help="a folder that is new or empty")
    form = p.add_mutually_exclusive_group()
    form.add_argument("--merged", action="store_true", help="whole weights, also where an adapter would do")
    form.add_argument("--adapter", action="store_true", help="an adapter, or an error where the candidate is not one")
    add("doctor", doctor, "check this machine and what is installed")
    p = add("new", new, "write a plugin: a package whose tests pass and whose strategy runs")
    p.add_argument("name", metavar="NAME", help="of the package, its options and its strategy; a Python name in lower-case letters")
    p.add_argument(
        "--roles", default="editor,rewarder", help="selector, editor, rewarder, updater, evaluator, middleware, observer (default: %(default)s)"
    )
    p.add_argument("--into", type=Path, default=Path(), metavar="FOLDER", help="where the package's folder is made (default: here)")
    p = add("check", check, "check an installed plugin: its options, its classes and the conformance of its strategies")
    p.add_argument("package", metavar="PACKAGE", help="a distribution, as `selfimprove list` names it")
    p.add_argument("--strategy", metavar="NAME", help="only this one of its strategies")
    p = add("completion", completion, 'shell completion: eval "$(selfimprove completion bash)"')
    p.add_argument("shell", choices=["bash", "zsh", "fish"])
    return parser


if __name__ == "__main__":
    sys.exit(main())
