"""The table of `--status`: where each submitted task is, by its scheduler and by the records of its run folder."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.tools.checkpoint_links import STATE_FILE, steps_in
from training.core.files import read_json_object
from training.hpc.requeue import is_complete
from training.hpc.submissions import Submitted
from training.run.folder import RunFolder
from training.run.metrics_log import read_metrics

_COLUMNS = ("experiment", "job", "state", "step", "of", "loss", "run")
# Words of both schedulers; what is not here is shown as the scheduler says it.
_STATES = {
    "PD": "pending", "R": "running", "CG": "ending", "RQ": "requeued", "CF": "starting", "S": "suspended",
    "PEND": "pending", "RUN": "running", "PSUSP": "suspended", "SSUSP": "suspended", "USUSP": "suspended",
}  # fmt: skip
_ENDED = ("CD", "F", "CA", "TO", "OOM", "NF", "PR", "BF", "DL", "DONE", "EXIT")


@dataclass(frozen=True)
class Progress:
    """What the files of a run say: steps done, steps of the whole run, and the last loss."""

    step: int | None
    goal: int | None
    loss: float | None
    complete: bool


def progress_of(folder: RunFolder) -> Progress:
    """Return the progress of a run: the step of its newest row or checkpoint, and its newest loss."""
    checkpoints = steps_in(folder.checkpoints)
    state = (read_json_object(checkpoints[0] / STATE_FILE) or {}) if checkpoints else {}
    rows = read_metrics(folder.metrics_file) if folder.metrics_file.is_file() else []
    loss = next((float(row["loss"]) for row in reversed(rows) if row.get("loss")), None)
    steps = [int(row["step"]) for row in rows[-1:]] + [state["step"] for _ in checkpoints[:1] if "step" in state]
    return Progress(max(steps, default=None), state.get("goal_steps"), loss, is_complete(folder))


def status_table(submitted: Sequence[Submitted]) -> str:
    """Return the table of these tasks as text, with a line for each."""
    states = scheduler_states(submitted)
    rows = [_row(one, states.get((one.job, one.task))) for one in submitted]
    widths = [max(len(row[column]) for row in [_COLUMNS, *rows]) for column in range(len(_COLUMNS))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in [_COLUMNS, *rows])
    return "\n".join(line.rstrip() for line in lines)


def _row(one: Submitted, state: str | None) -> tuple[str, ...]:
    progress = progress_of(RunFolder(one.run)) if one.run else Progress(None, None, None, False)
    if state is None or state in _ENDED:
        state = "complete" if progress.complete else _ended(state, bool(one.run))
    else:
        state = _STATES.get(state, state.lower())
    job = one.job if one.task is None else f"{one.job}_{one.task}"
    numbers = (progress.step, progress.goal, None if progress.loss is None else f"{progress.loss:.5g}")
    return (one.experiment, job, state, *("" if number is None else str(number) for number in numbers), one.run)


def _ended(state: str | None, trains: bool) -> str:
    """Return a word for a job that is over, by what the scheduler still knows of it."""
    if state in ("CD", "DONE"):
        return "incomplete" if trains else "complete"
    if state in ("CA",):
        return "cancelled"
    return "ended" if state is None and not trains else "incomplete" if state is None else "failed"


def scheduler_states(submitted: Sequence[Submitted]) -> dict[tuple[str, int | None], str]:
    """Return the state of each task that the scheduler still knows, in its own abbreviations."""
    states: dict[tuple[str, int | None], str] = {}
    arrays = {one.job for one in submitted if one.task is not None}
    for scheduler, command in _QUERIES.items():
        jobs = list(dict.fromkeys(one.job for one in submitted if one.scheduler == scheduler))
        for line in _lines([*command, *_ids(scheduler, jobs)]) if jobs else []:
            job, task, state = (part.strip() for part in line.split("|"))
            states[job, int(task) if job in arrays and task.isdecimal() else None] = state
    return states


_QUERIES = {
    "slurm": ["squeue", "--noheader", "--array", "--states=all", "--format=%F|%K|%t"],
    "lsf": ["bjobs", "-noheader", "-a", "-o", "jobid jobindex stat delimiter='|'"],
}


def _ids(scheduler: str, jobs: Sequence[str]) -> list[str]:
    return [f"--jobs={','.join(jobs)}"] if scheduler == "slurm" else list(jobs)


def _lines(command: Sequence[str]) -> list[str]:
    """Return the lines that a command prints; none if it is not installed, or no longer knows one of the jobs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in done.stdout.splitlines() if line.count("|") == 2]


def is_listed(one: Submitted, names: Sequence[str]) -> bool:
    """Return whether `--status NAME …` lists a task; without names it lists all."""
    return not names or one.submission in names or one.job in names or Path(one.run).name in names
