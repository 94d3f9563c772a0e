"""Where a run prints and logs: the terminal and run.log. Neither can end it, even if it can no longer be written."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.tools.cli import printable
from pipelines.tools.credentials import mask_credentials
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
        return mask_credentials(super().format(record))


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
    """Prints messages without breaking the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        tqdm.write(printable(mask_credentials(prefix + record.getMessage())))
        sys.stdout.flush()  # so that messages reach a file or a pipe at once


@contextmanager
def lasting_output() -> Iterator[None]:
    """Inside the block, printing never raises an error: the reader of a pipe may be gone, or a disk full."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = LastingStream(sys.stdout, "stdout"), LastingStream(sys.stderr, "stderr")  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class LastingStream:
    """A text stream that ignores errors of writing, after a single warning; everything else is that of `stream`."""

    def __init__(self, stream: Any, name: str):
        self._stream, self._name, self._failed = stream, name, False

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, action: Any) -> None:
        try:
            action()
        except (ValueError, AttributeError):  # it is closed; it is None in a program without a console
            return
        except OSError as error:
            if self._failed:
                return
            self._failed = True
            message = f"{self._name} can no longer be written ({error.strerror}); training continues"
            logger.warning("%s", message)
            if self._name == "stdout":
                print(f"warning: {message}", file=sys.stderr, flush=True)
