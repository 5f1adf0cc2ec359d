"""The helper process of grader=math: whether two expressions are equal, says math-verify."""

from __future__ import annotations

import functools
from typing import Any

from selfimprove.confined import serve


def equal(job: tuple[str, str]) -> bool:
    """Whether the second expression is equal to the first, which stands for the gold answer. Its own time limits would need signals."""
    import math_verify

    gold, text = (_parsed(expression) for expression in job)
    return bool(math_verify.verify(gold, text, timeout_seconds=None))


@functools.lru_cache(maxsize=10_000)
def _parsed(expression: str) -> Any:
    import math_verify

    return math_verify.parse(f"${expression}$", parsing_timeout=None)


if __name__ == "__main__":
    equal(("x^2", "x"))  # what is imported and built once counts for no job
    serve(equal)
