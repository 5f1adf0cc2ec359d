"""The sandbox: where code that nobody has read runs."""

from selfimprove.sandbox.isolation import Isolation, isolation
from selfimprove.sandbox.records import Limits, Outcome, Program, Refused
from selfimprove.sandbox.sandbox import Sandbox, Sandboxes

__all__ = ["Isolation", "Limits", "Outcome", "Program", "Refused", "Sandbox", "Sandboxes", "isolation"]
