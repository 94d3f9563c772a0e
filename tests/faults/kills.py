"""SIGKILL at random moments: a command is killed and typed again until it ends by itself, and is then compared."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.tools.checkpoint_links import linked_checkpoint
from tests.faults.compare import differences
from tests.faults.crash_points import leftovers, logged_steps
from tests.faults.lab import Command, Lab, Worker, runs
from tests.faults.table import Row, error_line
from training.run.checkpoint import step_of

STARTED = ("starting from scratch", "resumed from", "Drawing", "Training a", "Encoding")


@dataclass
class Killed:
    """A run of a command that was killed several times.

    Args:
        kills: number of times.
        in_writing: kills while a file or folder was written under a temporary name.
        lost: the most steps that one kill cost.
    """

    command: Command
    kills: int = 0
    in_writing: int = 0
    lost: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.command.name}, killed {self.kills} times: {'; '.join(self.problems)}"


def kill_often(lab: Lab, commands: Sequence[Command], kills: int, seed: int, cold: bool = False) -> Iterator[Killed]:
    """Yield killed runs of these commands in turn, until there were `kills` kills."""
    for command in commands:
        lab.changes(command)
    number, total = 0, 0
    while total < kills:
        batch = [(commands[(number + i) % len(commands)], seed + number + i) for i in range(lab.workers)]
        for run in lab.map(lambda worker, job: _kill_until_done(lab, worker, *job, cold), batch):
            total += run.kills
            yield run
        number += len(batch)


def row(fault: str, runs: list[Killed]) -> Row:
    kills, in_writing = sum(run.kills for run in runs), sum(run.in_writing for run in runs)
    return Row(
        fault=f"{fault}; {len(runs)} runs compared, {in_writing} kills while something was being written",
        tried=kills,
        wrong=[str(run) for run in runs if run.problems],
        steps_lost=max(run.lost for run in runs),
        statuses=Counter({-signal.SIGKILL: kills}),
    )


def _kill_until_done(lab: Lab, worker: Worker, command: Command, seed: int, cold: bool) -> Killed:
    moments, run = random.Random(seed), Killed(command)
    folder = worker.fresh(command, lab.reference)
    saved = 0
    while True:
        process = worker.start(command, folder, cold)
        moment = moments.uniform(0.0, 1.0 + 0.1 * run.kills)  # longer and longer, so that it ends on a slow machine
        _wait_for_start(worker, process, seconds=15 if cold else 0.3 * moment)
        time.sleep(moment)
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        done = worker.end()
        if done.status != -signal.SIGKILL:
            break
        run.kills += 1
        run.in_writing += any(folder.rglob(".*writing*")) or any(folder.rglob(".*.partial"))
        newest = _newest_checkpoint(folder / command.folder)
        if newest < saved:
            run.problems.append(f"the newest checkpoint was {saved} and is {newest}")
        run.lost, saved = max(run.lost, logged_steps(folder / command.folder) - newest), newest
    if done.status != 0 and "already" not in done.output:
        run.problems.append(f"exit status {done.status} ({error_line(done.output)})")
    run.problems += differences(folder / command.folder, lab.reference / command.folder)
    run.problems += [f"{name} is left over" for name in leftovers(folder, lab.reference)]
    if worker.hub_files(command) != lab.reference_hub[command.name]:
        run.problems.append("the repository on the Hub has other files")
    shutil.rmtree(folder)
    return run


def _wait_for_start(worker: Worker, process: int, seconds: float) -> None:
    """Wait until the command has imported its modules and printed something, but not longer than `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and runs(process):
        if worker.output.exists() and any(text in worker.output.read_text(errors="replace") for text in STARTED):
            return
        time.sleep(0.02)


def _newest_checkpoint(folder: Path) -> int:
    """Return the step of `latest`: a checkpoint counts from the moment at which this link leads to it."""
    latest = linked_checkpoint(folder / "checkpoints", "latest")
    return 0 if latest is None else step_of(latest)
