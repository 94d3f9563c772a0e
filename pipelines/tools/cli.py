"""What every command of the project shares: one kind of error for what the user can mend, and its exit status."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130


class UserError(Exception):
    """Something the user can mend: its message says the fact, the value seen, and the fix."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause naming the known word nearest to `name` (`'; did you mean X?'`), or nothing when none is near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def one_line(value: Any, limit: int | None = None) -> str:
    """`value` as text without line breaks, at most `limit` characters of it."""
    return " ".join(str(value).split())[:limit]


def cause(error: BaseException) -> str:
    """An error as the cause quoted in a message: its type, and its text on one line, at most 300 characters of it."""
    text = one_line(error, 300)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Options(argparse.ArgumentParser):
    """A command line whose mistakes are UserErrors; an unknown option's names the nearest known one."""

    def __init__(self, description: str | None):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The options in `argv`, or in the process's own arguments for None. Raises UserError."""
        options, unknown = self.parse_known_args(argv)
        if unknown:
            known = [option.lstrip("-") for action in self._actions for option in action.option_strings]
            flag = unknown[0].lstrip("-").split("=")[0]
            self.error(f"unknown argument {unknown[0]}{nearest(flag, known)}")
        return options


def entry_point(main: Callable[[], int | None]) -> None:
    """Run `main` as a program: a `UserError` becomes one message on stderr and exit status 2, without a traceback.

    `main` returns the exit status (None is 0).
    """
    # Diffusers imports bitsandbytes wherever it is installed, which then complains of kernels that nobody asked for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        status = main() or 0
    except UserError as error:
        # Under a launcher every rank sees the same mistake; once is enough for whoever reads it.
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        status = USER_ERROR_STATUS
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        status = INTERRUPTED_STATUS
    except BrokenPipeError:  # `... | head` closed our stdout
        sys.stderr.close()
        status = 1
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Gloo's threads, still running while the interpreter takes itself apart, now and then abort a process whose
        # work is done and saved ("terminate called without an active exception"); so it is not taken apart.
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed, here or at the other end
                stream.flush()
        os._exit(status)
    sys.exit(status)
