"""Submitting jobs, and the list of those that were submitted: jobs.jsonl, a line for each task."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.tools.cli import UserError, nearest
from training.core.files import write_atomically
from training.hpc.jobs import Job, Waiting, submission_script

RECORD = "jobs.jsonl"
_COMMANDS = {"slurm": "sbatch", "lsf": "bsub"}


@dataclass(frozen=True)
class Submitted:
    """A task of a job that was submitted."""

    submission: str
    """Name that --after and --status know it by"""
    job: str
    name: str
    """Name of the job; the jobs of one submission have different names"""
    task: int | None
    """Number of the task of an array, from 1; None for a job of one task"""
    experiment: str
    run: str
    scheduler: str
    at: float
    """Unix time of the submission"""


def submit(jobs: Sequence[Job], folder: Path) -> list[Submitted]:
    """Submit jobs in order, keep their scripts and list them in the folder of logs.

    Raises:
        UserError: the scheduler is not installed here, or refuses a job. Jobs before that one remain submitted.
    """
    site, name = jobs[0].site, jobs[-1].name
    logs = Path(site.log_dir)
    logs.mkdir(parents=True, exist_ok=True)
    script = logs / f"{name}.submission.sh"
    write_atomically(script, submission_script(jobs, folder))
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, cwd=folder)
    ids = dict(re.findall(r"^(\S+) (\d+)$", done.stdout, re.MULTILINE))
    submitted = [
        Submitted(name, ids[job.name], job.name, number if len(job.tasks) > 1 else None, task.name, task.run,
                  site.scheduler, time.time())
        for job in jobs if job.name in ids
        for number, task in enumerate(job.tasks, 1)
    ]  # fmt: skip
    with (logs / RECORD).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(dataclasses.asdict(one)) + "\n" for one in submitted)
    if done.returncode != 0 or len(ids) < len(jobs):
        command = _COMMANDS[site.scheduler]
        reason = done.stderr.strip() or done.stdout.strip() or f"{command} printed no job id"
        there = (
            f"; submitted before that: {', '.join(f'{name} {number}' for name, number in ids.items())}" if ids else ""
        )
        raise UserError(
            f"{command} did not accept the job ({reason}){there}. Correct the site file or the flags; the script is "
            f"{script}"
        )
    return submitted


def read_submitted(log_dir: str | Path) -> list[Submitted]:
    """Return the tasks that were submitted, oldest first; lines that are damaged are left out."""
    file = Path(log_dir, RECORD)
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            found.append(Submitted(**json.loads(line)))
        except (ValueError, TypeError):  # the end of a full disk, a line of another version
            continue
    return found


def newest(submitted: Sequence[Submitted], submission: str) -> list[Submitted]:
    """Return the tasks of the newest submission of that name."""
    named = [one for one in submitted if one.submission == submission]
    return [one for one in named if one.at > named[-1].at - 1.0]


def waiting_for(names: Sequence[str], log_dir: str | Path, *, dry_run: bool = False) -> list[Waiting]:
    """Return the jobs that `--after` names: ids of jobs, or names of earlier submissions.

    Args:
        dry_run: whether the script is only printed, which the message of the error then mentions.

    Raises:
        UserError: no job of a name was submitted from here.
    """
    submitted = read_submitted(log_dir)
    waits_for: list[Waiting] = []
    for name in names:
        if re.fullmatch(r"\d+", name):
            waits_for.append(Waiting(name))
            continue
        tasks = newest(submitted, name)
        if not tasks:
            known = sorted({one.submission for one in submitted})
            needed = ", as the script that --dry_run prints contains its id" if dry_run else ""
            raise UserError(
                f"--after {name}: no job of this name was submitted from here{nearest(name, known)}; submit it first"
                f"{needed}, or give the id of a job"
            )
        waits_for += [Waiting(job) for job in dict.fromkeys(one.job for one in tasks)]
    return waits_for
