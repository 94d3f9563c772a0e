"""Check what this machine can do, and whether something is missing: device, memory, disks, versions, logins.

    python training/doctor.py
    python training/doctor.py --output doctor.json

The table has one row for each check: its state, its name, the value, and after an arrow what to do. Tokens are not
shown, and the home folder is written as ~, so that the table can be sent to other people. The exit status is 1 if
something is missing that every run needs, and otherwise 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # it says what is missing, so it starts although Halftone is not installed
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from pipelines.tools.cli import Options, UserError, entry_point, located
from training.core.files import write_json
from training.diagnostics import accounts, machine, software
from training.diagnostics.finding import STATES, Finding, run_checks

GROUPS = {"Machine": machine.CHECKS, "Software": software.CHECKS, "Accounts and launchers": accounts.CHECKS}
STATE_WIDTH, NAME_WIDTH = max(map(len, STATES)), 19
NARROWEST = 80


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    if options.output and not Path(options.output).absolute().parent.is_dir():
        raise UserError(f"--output {located(options.output)}: its folder does not exist; make it, or name another file")
    found: dict[str, list[Finding]] = {}
    for group, checks in GROUPS.items():
        print(f"{group}:", flush=True)
        found[group] = []
        for finding in run_checks(checks):
            found[group].append(finding)
            print(row(finding, table_width()), flush=True)
        print()
    findings = [finding for group in found.values() for finding in group]
    print(verdict(findings))
    if options.output:
        save(found, Path(options.output))
    return int(any(finding.state == "missing" for finding in findings))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options. Raises UserError."""
    parser = Options(__doc__)
    parser.add_argument("--output", help="JSON file to write the same table to, for example for a bug report")
    return parser.parse(argv)


def table_width() -> int | None:
    """Return the width of the terminal; None if the output is not a terminal, so that each row stays one line."""
    return max(NARROWEST, shutil.get_terminal_size().columns) if sys.stdout.isatty() else None


def row(finding: Finding, width: int | None = None) -> str:
    """Return a row of the table; in a terminal of `width` columns, long texts continue below themselves."""
    start = f"  {finding.state.ljust(STATE_WIDTH)}  {finding.name.ljust(NAME_WIDTH)}  "
    text = f"{finding.value}  → {finding.advice}" if finding.advice else finding.value
    if width is None:
        return start + " ".join(text.split("\n"))
    indent = " " * len(start)
    return textwrap.fill(text, width, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False)


def verdict(findings: Sequence[Finding]) -> str:
    """Return the sentences below the table: whether a run can start, and what the states mean."""
    counts = Counter(finding.state for finding in findings)
    missing = [finding.name for finding in findings if finding.state == "missing"]
    if missing:
        first = f"Missing: {', '.join(missing)}. Every run needs this; see the arrows above."
    else:
        first = "Nothing is missing that every run needs."
    meanings = "; ".join(f"{state}: {meaning} ({counts[state]})" for state, meaning in STATES.items() if counts[state])
    return f"{first}\n{meanings}."


def save(found: dict[str, list[Finding]], path: Path) -> None:
    """Write the table as JSON. Raises UserError if the file cannot be written."""
    rows = [{"group": group, **dataclasses.asdict(finding)} for group, rows in found.items() for finding in rows]
    try:
        write_json(path, {"missing": [row["name"] for row in rows if row["state"] == "missing"], "checks": rows})
    except OSError as error:
        reason = error.strerror
        raise UserError(f"--output {path} cannot be written ({reason}); name a file in another folder") from None
    print(f"The table is also in {path}.")


if __name__ == "__main__":
    entry_point(main)
