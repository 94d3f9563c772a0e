"""Runs commands on a pseudo-terminal, and reconstructs what it shows."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios
from collections.abc import Sequence
from pathlib import Path


def on_terminal(command: Sequence[str | Path], *, columns: int = 100, **options) -> tuple[int, str]:
    """Run a command whose output is a terminal; return its exit status, and all that it wrote."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(list(command), stdin=theirs, stdout=theirs, stderr=theirs, **options)
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the last program has closed the terminal
            break
        if not part:
            break
        written += part
    os.close(ours)
    return process.wait(), written.decode()


def screen(written: str) -> list[str]:
    """Return the lines that a wide terminal shows after this output: a carriage return writes over a line."""
    lines = []
    for line in written.replace("\r\n", "\n").split("\n"):
        shown: list[str] = []
        for part in line.split("\r"):
            shown[: len(part)] = part
        lines.append("".join(shown).rstrip())
    return lines
