"""The genome: the initial agent, the donor pool, and what a run needs of an agent's folder."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from selfimprove.code import PatchError, Tree, patched, read_tree
from selfimprove.records import Lineage

PART = "code"
ENTRY = "agent.py"
_HERE = Path(__file__).parent


@cache
def initial() -> Mapping[str, str]:
    """The initial agent's folder."""
    return read_tree(_HERE / "agent")


@cache
def donors() -> Mapping[str, str]:
    """Operators that an agent may learn, by name: the text of each module."""
    return {name.removesuffix(".py"): text for name, text in read_tree(_HERE / "donors").items()}


def child_of(tree: Tree, patch: str) -> dict[str, str]:
    """A tree after a patch. Raises: PatchError, where the patch does not fit, or leaves code that does not compile."""
    found = patched(tree, patch)
    if ENTRY not in found:
        raise PatchError(f"the patch leaves no {ENTRY}, so nothing can run")
    for name, text in found.items():
        if name.endswith(".py"):
            try:
                ast.parse(text)
            except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
                raise PatchError(f"{name} does not compile after the patch ({str(e)[:100]})") from e
    return found


def failed_items(lineage: Lineage, candidate: str) -> list[str]:
    """Ids of the items that a candidate did not solve when it was measured, in the order of measuring."""
    found: dict[str, float] = {}
    for evaluation in lineage.evaluations(candidate):
        found |= evaluation.per_item
    return [item for item, value in found.items() if value < 1]
