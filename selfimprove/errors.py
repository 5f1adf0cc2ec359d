"""The error model.

A *bad trial* (an edit that cannot be parsed, an answer that is empty) is data: an `Evaluation` with
``score=None`` and the reason in ``error``. It never raises. Everything below is raised:

* `UserError` and its kinds: something a user wrote or a machine lacks. The command line prints the
  message, without a traceback, and exits with code 2. The message says what was wanted, what came
  and what to do.
* `ContractError`: a plugin broke the contract of its role. A bug of the plugin, named in the message.
* Anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class SelfImproveError(Exception):
    """The base of every error that this package raises on purpose."""


class UserError(SelfImproveError):
    """Something the user can mend: a name, a path, a value, a missing package, a full disk."""


class ConfigError(UserError):
    """A configuration that cannot work."""


class AdmissionError(ConfigError):
    """A plugin that may not take the role it was given, or a combination that cannot work."""


class ResumeError(UserError):
    """A run folder that does not belong to this model, configuration or package version."""


class StorageError(UserError):
    """A folder that cannot be written, or a file in it that cannot be trusted."""


class ServerError(UserError):
    """A server that cannot be reached, refuses, or answers with something else than it was asked for."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        """The HTTP status that it answered with, where it is an error's."""


class LabelError(ConfigError):
    """A plugin read labels without declaring it."""


class SealedError(ConfigError):
    """Something asked for the sealed test split inside a run."""


class ContractError(SelfImproveError):
    """A plugin's hook returned something that its role does not allow."""
