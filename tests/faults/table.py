"""The rows of docs/reliability.md."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Row:
    """A fault that was produced.

    Args:
        tried: number of times.
        wrong: a line for each time that something was lost, or the message or the exit status was not as documented.
        steps_lost: the most that a run had to repeat; None if no run takes part.
        status: exit statuses, with the number of times.
        message: what the command printed.
    """

    fault: str
    tried: int
    wrong: list[str] = field(default_factory=list)
    steps_lost: int | None = None
    status: str = ""
    message: str = ""
