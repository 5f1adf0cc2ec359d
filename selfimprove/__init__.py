"""A pluggable framework of self-improvement strategies for language models. Start at `selfimprove.hooks`."""

from selfimprove.hooks import hookimpl
from selfimprove.loop import improve
from selfimprove.payloads import payload
from selfimprove.records import Candidate, Edit, Evaluation, Lineage, Part, Round, Trial
from selfimprove.run import Run
from selfimprove.task import Item, Question

__version__ = "0.1.0"
__all__ = [
    "Candidate",
    "Edit",
    "Evaluation",
    "Item",
    "Lineage",
    "Part",
    "Question",
    "Round",
    "Run",
    "Trial",
    "hookimpl",
    "improve",
    "payload",
]
