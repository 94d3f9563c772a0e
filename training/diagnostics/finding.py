"""What a check of `make doctor` found, and running checks that cannot end the program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.tools.cli import cause, printable
from pipelines.tools.credentials import mask_credentials

State = Literal["ok", "warning", "missing", "optional"]
STATES: dict[State, str] = {
    "ok": "as it should be",
    "warning": "it works, with the limits named",
    "missing": "needed by every run",
    "optional": "absent, and needed only for what is named",
}


@dataclass(frozen=True)
class Finding:
    """One row of the table: what was checked, its state and value, and what to do about it."""

    name: str
    state: State
    value: str
    advice: str = ""


Check = Callable[[], Iterable[Finding]]


def run_checks(checks: Mapping[str, Check]) -> Iterator[Finding]:
    """Yield what the checks find. Any error of a check becomes a finding with the name of the check.

    Tokens and control characters are masked in all findings.
    """
    for name, check in checks.items():
        try:
            yield from map(_clean, check())
        except ModuleNotFoundError as error:
            yield Finding(name, "warning", f"not checked, because {error.name} is not installed")
        except Exception as error:  # the machine may be broken in any way, and the other checks still help
            yield _clean(Finding(name, "warning", f"could not be checked ({cause(error)})"))


def shown(path: str | Path) -> str:
    """Return a path as text, with `~` for the home folder, so that a table can be shown to other people."""
    path, home = Path(path).absolute(), Path.home()
    return f"~/{path.relative_to(home).as_posix()}" if path.is_relative_to(home) else str(path)


def _clean(finding: Finding) -> Finding:
    value, advice = (printable(mask_credentials(text)) for text in (finding.value, finding.advice))
    return Finding(finding.name, finding.state, value, advice)
