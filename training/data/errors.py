"""The errors about data that a loader worker may raise."""

from __future__ import annotations

from pipelines.tools.cli import UserError


class WorkerError(UserError):
    """An error about the data that may be raised in a loader worker."""

    def __init__(self, message: str):
        # DataLoader builds a worker's exception again from its printed traceback; keep only the message for the user.
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())
