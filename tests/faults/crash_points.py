"""Faults at every change of the file system: a command is disturbed at its k-th change, and then typed again."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.compare import differences, excused
from tests.faults.lab import Command, Done, Lab, Worker
from tests.faults.shim import Change, Fault
from tests.faults.table import Row, error_line

# Exit statuses of docs/runs.md, and 0: the command was complete, or the fault hit something that merely informs.
# A command that makes data ends at once on a signal, as programs do.
STATUSES = {
    "SIGKILL": {-signal.SIGKILL},
    "SIGTERM": {0, 75, -signal.SIGTERM},
    "Ctrl-C twice": {0, 130, -signal.SIGINT},
    "ENOSPC": {0, 2, 3},
    "ENOSPC from there on": {0, 2, 3},
    "EIO": {0, 2, 3},
}


@dataclass
class Trial:
    """A command that was disturbed at one change and typed again."""

    command: Command
    fault: Fault
    change: Change
    disturbed: Done
    again: Done
    lost: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        where = f"{self.change.number} {self.change.operation} {self.change.path}"
        return f"{self.command.name}, {self.fault.name} at {where}: {'; '.join(self.problems)}"


def disturb(lab: Lab, command: Command, fault: Fault, every: int) -> Iterator[Trial]:
    """Yield a trial for every `every`-th change that `command` makes."""
    changes = [change for change in lab.changes(command) if _applies(fault, change)]

    def attempt(worker: Worker, change: Change) -> Trial:
        return try_once(lab, worker, command, fault, change)

    # The last changes are the likeliest to be missed, so counting begins at the end.
    yield from lab.map(attempt, changes[::-1][::every])


def try_once(lab: Lab, worker: Worker, command: Command, fault: Fault, change: Change) -> Trial:
    folder = worker.fresh(command, lab.reference)
    worker.plan.arm(folder, change.number, fault)
    disturbed = worker.type(command, folder)
    happened, hit = worker.plan.faults(), worker.plan.changes()
    worker.plan.clear()
    change = next((c for c in hit if c.number == change.number), change)
    reached = logged_steps(folder / command.folder)
    again = worker.type(command, folder)
    trial = Trial(command, fault, change, disturbed, again)
    if happened:
        trial.lost = max(0, reached - resumed_step(again.output)) if again.output else 0
        trial.problems += _problems_of_end(fault, disturbed)
    trial.problems += _problems_of_repetition(lab, worker, trial, folder)
    shutil.rmtree(folder)
    return trial


def disturbed(lab: Lab, command: Command, fault: Fault, every: int) -> Row:
    """Try a fault at every `every`-th change that `command` makes, and summarize the trials."""
    which = "every change" if every == 1 else f"one change in {every}"
    result = Row(f"{fault.name} before {which} of the file system by {command.name}")
    for trial in disturb(lab, command, fault, every):
        result.record(trial.disturbed, [str(trial)] if trial.problems else [], trial.lost)
    return result


def _applies(fault: Fault, change: Change) -> bool:
    """Return whether a fault at this change differs from one at the next change, and can happen there."""
    if fault.signal:
        return change.operation != "fsync"  # what other processes see is the same before and after it
    return fault.error != errno.ENOSPC or change.operation not in ("unlink", "rmdir")


def _problems_of_end(fault: Fault, done: Done) -> Iterator[str]:
    """Check how a disturbed command ended: its exit status, and a message that names the cause."""
    if done.status is None:
        yield "it hung"
        return
    if done.status not in STATUSES[fault.name]:
        yield f"exit status {done.status}"
    if "Traceback" in done.output:
        yield f"traceback ({error_line(done.output)})"
    elif fault.error and done.status == 2 and not _names_the_cause(fault, done.output):
        yield f"the message does not name the cause ({error_line(done.output)})"


def _names_the_cause(fault: Fault, output: str) -> bool:
    return os.strerror(fault.error) in output or (fault.error == errno.ENOSPC and " is full" in output)


def _problems_of_repetition(lab: Lab, worker: Worker, trial: Trial, folder: Path) -> Iterator[str]:
    """Check the same command, typed again: it succeeds, and everything is as if nothing had happened."""
    command, again = trial.command, trial.again
    if again.status != 0 and not _is_complete(again):
        yield f"typed again: exit status {again.status} ({error_line(again.output)})"
        return
    disturbed = trial.disturbed
    reported = disturbed.status == 0 and trial.fault.error and _names_the_cause(trial.fault, disturbed.output)
    lines = differences(folder / command.folder, lab.reference / command.folder)
    allowed = excused(lines, lab.reference / command.folder) if reported else set()
    yield from (line for line in lines if line not in allowed)
    for name in leftovers(folder, lab.reference):
        yield f"{name} is left over"
    if worker.hub_files(command) != lab.reference_hub[command.name]:
        yield "the repository on the Hub has other files"


def leftovers(folder: Path, reference: Path) -> list[str]:
    """Return what lies beside the folders of undisturbed commands."""
    return sorted({path.name for path in folder.iterdir()} - {path.name for path in reference.iterdir()})


def _is_complete(again: Done) -> bool:
    """Return whether a command was refused because what it makes is there; whether it is equal is compared anyway."""
    return again.status == 2 and "already" in again.output


def logged_steps(folder: Path) -> int:
    """Return the last step in metrics.csv."""
    file = folder / "metrics.csv"
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    return int(lines[-1].split(",")[0]) if len(lines) > 1 and lines[-1].split(",")[0].isdigit() else 0


def resumed_step(output: str) -> int:
    found = re.search(r"resumed from \S+ at step (\d+)|is complete\b.*?: (\d+) steps", output)
    return int(found[1] or found[2]) if found else 0
