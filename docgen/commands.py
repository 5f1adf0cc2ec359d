"""The page of the command line, written from its parser."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from selfimprove import cli


def page() -> str:
    """Every command, what it takes, and what the exit code means."""
    parser = cli._parser()
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    lines = ["# Commands", "", "Exit codes: " + (cli.main.__doc__ or "").strip().removeprefix("The exit code: "), ""]
    for name, command in commands.items():
        lines += [f"## `selfimprove {name}`", "", f"{(command.description or '').strip()[:1].upper()}{(command.description or '').strip()[1:]}.", ""]
        lines += [*_table(command), ""]
    return "\n".join(lines)


def _table(command: argparse.ArgumentParser) -> Iterator[str]:
    actions = [a for a in command._actions if not isinstance(a, argparse._HelpAction)]
    if actions:
        yield "| argument | what it is |"
        yield "|---|---|"
    for action in actions:
        shown = action.metavar if isinstance(action.metavar, str) else "|".join(action.choices or ()) or action.dest.upper()
        words = [f"{flag} {shown}" if action.nargs != 0 else flag for flag in action.option_strings] or [shown]
        about = (action.help or "").replace("%(default)s", str(action.default))
        yield f"| {', '.join(f'`{w}`' for w in words)} | {about} |"
