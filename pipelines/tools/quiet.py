"""What libraries print, in one place: their progress bars, warnings and logs.

Every command of Halftone calls `quieten_libraries` first, through `entry_point`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from typing import Any, TextIO

from .credentials import mask_credentials

LIBRARIES = ("accelerate", "datasets", "diffusers", "huggingface_hub", "torch", "transformers")
SECONDS_BEFORE_A_BAR = 2.0
MOST_CHARACTERS = 500


def quieten_libraries() -> None:
    """Let libraries neither draw bars for quick work nor write across our bar.

    - Their bars are drawn on a terminal only, for work of more than two seconds, and not beside a bar of ours. They
      disappear at the end.
    - Their warnings, and those of the pipelines, are one line that begins with "warning:".
    - Deprecations are hidden: they are meant for developers. `python -W` or PYTHONWARNINGS shows them.
    """
    # Diffusers imports bitsandbytes if it is installed, which then warns about kernels that are not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category=category)
        warnings.showwarning = _show_warning
    pipelines = logging.getLogger("pipelines")
    pipelines.handlers, pipelines.propagate = [_Handler()], False
    _calm_bars()


def route_library_logs() -> None:
    """Print the log of libraries that are imported by now as lines that do not write across our bar."""
    for name in LIBRARIES:
        if name in sys.modules and logging.getLogger(name).handlers:
            logging.getLogger(name).handlers = [_Handler()]


def say(text: str, stream: TextIO) -> None:
    """Print a line to stdout or stderr, above a bar if there is one. It may go unread."""
    from tqdm import tqdm

    with contextlib.suppress(OSError, ValueError, AttributeError), tqdm.external_write_mode(stream):
        # Flushed before the bar is drawn again, which is on another stream.
        print(text, file=stream, flush=True)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        say(prefix + _one_line(record.getMessage()), sys.stderr)


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    say(f"warning: {_one_line(str(message))}", sys.stderr)


def _one_line(text: str) -> str:
    from .cli import printable

    return printable(mask_credentials(" ".join(text.split())[:MOST_CHARACTERS]))


@functools.cache
def _calm_bars() -> None:
    """Change the defaults of tqdm, with which all of these libraries draw their bars, once in a process.

    tqdm reads its environment variables when it is imported, which torch does before any command can set them.
    """
    try:
        import tqdm

        from .progress import Progress, is_terminal
    except ImportError:  # `make doctor` starts where nothing is installed
        return

    begin = tqdm.tqdm.__init__

    def calm(self: Any, *arguments: Any, **options: Any) -> None:
        if len(arguments) <= 3:  # iterable, description, total
            options = {"leave": False, "delay": SECONDS_BEFORE_A_BAR, "dynamic_ncols": True} | options
            if Progress.on_screen or not is_terminal():
                options["disable"] = True
        begin(self, *arguments, **options)

    tqdm.tqdm.__init__ = calm  # type: ignore[method-assign]
