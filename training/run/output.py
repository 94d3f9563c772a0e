"""Where a run prints and logs: the terminal and run.log. Neither can end it, even if it can no longer be written."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from pipelines.tools.cli import output_errors, printable
from pipelines.tools.credentials import mask_credentials
from pipelines.tools.private import without_private
from pipelines.tools.quiet import say
from training.core.informing import Informing

logger = logging.getLogger("halftone")

MOST_WAITING_LINES = 1000


def start_logging(log_file: Path | None) -> None:
    """Send log messages to the terminal and to `log_file`, with their time; without a file, only errors are shown.

    Access tokens are masked in both.
    """
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    terminal = _TerminalHandler()
    terminal.setLevel(logging.INFO if log_file else logging.ERROR)
    logger.addHandler(terminal)
    if log_file:
        logger.addHandler(_FileHandler(log_file))


class _MaskingFormatter(logging.Formatter):
    """Masks access tokens, also those in the text of a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return without_private(super().format(record))


class _FileHandler(logging.Handler):
    """Appends messages to a file, which is opened for each of them, as the folder may be deleted and created again.

    Lines that cannot be written wait in memory until the next message.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.setFormatter(_MaskingFormatter("%(asctime)s %(levelname)s %(message)s"))
        self._path, self._informing = path, Informing()
        self._waiting: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._waiting.append(self.format(record) + "\n")
        del self._waiting[:-MOST_WAITING_LINES]
        with self._informing(self._path.name), self._path.open("a", encoding="utf-8") as file:
            file.write("".join(self._waiting))
            file.flush()
            self._waiting.clear()


class _TerminalHandler(logging.Handler):
    """Prints messages without breaking the progress bar. That stdout can no longer be written is a message as well."""

    def __init__(self) -> None:
        super().__init__()
        self._lost: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        say(printable(mask_credentials(prefix + record.getMessage())), sys.stdout)
        for name, error in output_errors().items():
            if name not in self._lost:
                self._lost.add(name)
                message = f"{name} can no longer be written ({error.strerror}); training continues"
                print(f"warning: {message}", file=sys.stderr, flush=True)
                logger.warning("%s", message)
