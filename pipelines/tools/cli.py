"""What all commands share: the error class for problems that the user can fix, its exit status, and option parsing."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import gc
import io
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from .credentials import mask_credentials
from .quiet import quieten_libraries

USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130
REQUEUE_STATUS = 75
# Threads of this name may wait for a network when the program ends; nobody waits for them.
BACKGROUND = "background"
_CTRL_C_AGAIN_SECONDS = 0.01
TOKEN_ADVICE = (
    "remove it and give the token in one of these ways: run `hf auth login`, set the environment variable HF_TOKEN, or "
    "(for training) write the token into a file and add --hub_token_file PATH"
)

# The embedding, override and isolate characters; the marks that Arabic and Hebrew texts use are not among them.
BIDI_CONTROLS = "\u202a-\u202e\u2066-\u2069"
CONTROL_CHARACTERS = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f{BIDI_CONTROLS}]")


class UserError(Exception):
    """Error that the user can fix. Its message says what is wrong, which value was given, and how to fix it."""


class ReportedError(UserError):
    """An error that another process of the same run has reported; this one prints nothing and ends with `status`."""

    def __init__(self, message: str, status: int = USER_ERROR_STATUS):
        super().__init__(message)
        self.status = status


class SecretOnCommandLine(UserError):
    """A command line contains an access token."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a clause that suggests the most similar known name (`'; did you mean X?'`), or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def located(path: str | os.PathLike[str]) -> str:
    """Return a path for messages as it was given, followed by the absolute path if it is another one."""
    absolute = os.path.abspath(os.path.expanduser(path))
    return f"'{path}'" if str(path) == absolute else f"'{path}' ({absolute})"


def one_line(value: Any, limit: int | None = None) -> str:
    """Return `value` as text without line breaks, truncated to `limit` characters."""
    return " ".join(str(value).split())[:limit]


def printable(value: Any) -> str:
    """Return `value` as text in which control characters, except line breaks and tabs, are written as `\\x1b`.

    A caption, a file name or a class name from somebody else could otherwise move the cursor of the terminal, change
    its title or reverse the direction of the text (`BIDI_CONTROLS`).
    """
    return CONTROL_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode(), str(value))


def cause(error: BaseException) -> str:
    """Format an error for quoting it in a message: its type and its text, on one line of at most 300 characters."""
    text = one_line(error, 300)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def refuse_hub_token(words: Iterable[str]) -> None:
    """Raise UserError if a command line contains `--hub_token`; the message does not repeat the token."""
    for word in words:
        flag = word.split("=", 1)[0].rstrip("+")
        if flag.startswith("-") and flag.lstrip("-").replace("-", "_") == "hub_token":
            raise SecretOnCommandLine(
                "--hub_token is not accepted, because other programs can read a command line, and launchers, trackers "
                f"and logs record it; {TOKEN_ADVICE}. Replace the token that was on this command line by a new one"
            )


class Options(argparse.ArgumentParser):
    """Argument parser that raises a UserError for an invalid option, and suggests the nearest one if it is unknown."""

    def __init__(self, description: str | None):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse `argv`, or the arguments of the process if it is None. Raises UserError."""
        refuse_hub_token(sys.argv[1:] if argv is None else argv)
        options, unknown = self.parse_known_args(argv)
        if unknown:
            known = [option.lstrip("-") for action in self._actions for option in action.option_strings]
            argument = unknown[0].split("=")[0] if unknown[0].startswith("-") else unknown[0]
            self.error(f"unknown argument {argument}{nearest(argument.lstrip('-'), known)}")
        return options


def _print_every_character() -> None:
    """Print `?` for a character that the encoding of the terminal lacks, instead of raising UnicodeEncodeError.

    The encoding itself is kept: it is what the terminal, or the program at the other end of a pipe, decodes.
    """
    for stream in (sys.stdout, sys.stderr):  # each is None in a Windows program without a console
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


class _Lenient(io.FileIO):
    """A descriptor that drops what cannot be written: the terminal was closed, the reader ended, the disk is full."""

    error: OSError | None = None  # the first one

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            self.error = self.error or error
            return memoryview(data).nbytes


def keep_running_without_output() -> None:
    """Let the program continue when nobody reads its output any more; for commands that have something to save."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # Notebooks and test runners have replaced the streams by their own.
        if type(stream) is io.TextIOWrapper and stream is getattr(sys, f"__{name}__"):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
            raw = _Lenient(stream.fileno(), "wb", closefd=False)
            buffer = io.BufferedWriter(raw)
            # With PYTHONUNBUFFERED, a stream writes through instead of line by line.
            by_line = stream.line_buffering or stream.write_through or name == "stderr"
            lenient = io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=by_line)
            setattr(sys, name, lenient)


def output_errors() -> dict[str, OSError]:
    """Return the first error of writing to stdout and to stderr, after `keep_running_without_output`."""
    raws = {name: getattr(getattr(getattr(sys, name), "buffer", None), "raw", None) for name in ("stdout", "stderr")}
    return {name: raw.error for name, raw in raws.items() if isinstance(raw, _Lenient) and raw.error is not None}


def print_error(error: Exception) -> None:
    """Print an error to stderr as one message, without access tokens and control characters. It may go unread."""
    _print_message(f"error: {printable(mask_credentials(str(error)))}")


def _print_message(message: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(message, file=sys.stderr, flush=True)


def entry_point(main: Callable[[], int | None]) -> None:
    """Run `main` as a program and exit with its return value as status (None is 0).

    A `UserError` is printed to stderr as one message without a traceback and without access tokens, and the exit
    status is 2. Characters that the encoding of the terminal lacks are printed as `?`.
    """
    _print_every_character()
    sys.unraisablehook = _on_unraisable
    quieten_libraries()
    try:
        _check_working_folder()
        status = _without_wrapping(main) or 0
    except ReportedError as error:
        status = error.status
    except UserError as error:
        # Before the processes of a run are connected, each of them raises the same error, so only rank 0 prints it.
        if os.environ.get("RANK", "0") == "0":
            print_error(error)
        status = USER_ERROR_STATUS
        if isinstance(error, SecretOnCommandLine):
            _end_launcher()
    except KeyboardInterrupt:
        _print_message("stopped")
        status = INTERRUPTED_STATUS
    except BrokenPipeError:  # `... | head` closed our stdout
        sys.stderr.close()
        status = 1
    _exit(status)


def _without_wrapping(main: Callable[[], int | None]) -> int | None:
    """Return the status of `main`. Raise a stop itself, where a compiled library made an ImportError of it."""
    try:
        return main()
    except ImportError as error:
        if isinstance(error.__cause__, KeyboardInterrupt | SystemExit):
            raise error.__cause__ from None
        raise


def _on_unraisable(caught: Any) -> None:
    """Ask again for an end that Python has dropped: a signal handler may run in a destructor, which cannot raise."""
    if isinstance(caught.exc_value, KeyboardInterrupt):
        # Later, because this function cannot raise either.
        threading.Timer(_CTRL_C_AGAIN_SECONDS, signal_main_thread, [signal.SIGINT]).start()
    else:
        sys.__unraisablehook__(caught)


def signal_main_thread(number: int) -> None:
    """Send a signal to the main thread of this process, which may be waiting in a system call."""
    if hasattr(signal, "pthread_kill"):
        main_thread = threading.main_thread().ident
        assert main_thread is not None
        signal.pthread_kill(main_thread, number)
    else:  # Windows
        signal.raise_signal(number)


def _check_working_folder() -> None:
    try:
        os.getcwd()
    except OSError:
        raise UserError("the working folder no longer exists; change to another folder (cd)") from None


def _end_launcher() -> None:
    """End an `accelerate launch` that started this process alone: it would print the command line with its token."""
    with contextlib.suppress(ImportError, OSError):
        import psutil

        with contextlib.suppress(psutil.Error):
            launcher = psutil.Process().parent()
            if launcher is not None and "accelerate" in " ".join(launcher.cmdline()[:4]):
                launcher.terminate()


@contextmanager
def in_background() -> Iterator[None]:
    """Context of work of this thread that the end of the program need not wait for, such as a request to a server."""
    thread = threading.current_thread()
    name = thread.name
    thread.name = f"{BACKGROUND}-{name}"
    try:
        yield
    finally:
        thread.name = name


def _exit(status: int) -> NoReturn:
    """Flush all output and end the process; without the shutdown of the interpreter where that could take long.

    A process that was asked to stop ends at once. Threads of Gloo sometimes abort the shutdown although all work is
    done and saved ("terminate called without an active exception"). Libraries of trackers wait in it for their server.
    """
    # All is done and said: a Ctrl-C within the shutdown of the interpreter would print a traceback. So would PyTorch,
    # which answers the death of a loader process with an exception in whatever code runs at that moment.
    for number in (signal.SIGINT, getattr(signal, "SIGCHLD", signal.SIGINT)):  # Windows has no SIGCHLD
        with contextlib.suppress(ValueError):
            signal.signal(number, signal.SIG_DFL)
    # Loader processes ignore SIGTERM, which multiprocessing would send to them before it waits for their end.
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
    waiting = any(thread.name.startswith(BACKGROUND) for thread in threading.enumerate())
    _flush_output()
    if not (waiting or status in (INTERRUPTED_STATUS, REQUEUE_STATUS) or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        gc.freeze()  # or else Python searches all that torch and Diffusers made for garbage, for more than a second
        sys.exit(status)
    logging.shutdown()
    _flush_output()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)


def _flush_output() -> None:
    """Flush stdout and stderr. What cannot be written is dropped: Python would otherwise exit with status 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # a full disk, no reader, closed; None without a console
            with contextlib.suppress(OSError, ValueError, AttributeError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)
