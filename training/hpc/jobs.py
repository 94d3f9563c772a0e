"""Jobs of a scheduler: what each of them runs, what it waits for, and the scripts that the templates make of it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.tools.cli import UserError, located, one_line
from pipelines.tools.resources import CODE, shipped_path
from training.hpc.sites import CLUSTER_FILES, Site

REQUEUE = "training/hpc/requeue.py"
_NAME = re.compile(r"[A-Za-z][\w.+-]{0,99}")


@dataclass(frozen=True)
class Task:
    """One command of a job."""

    name: str
    words: list[str]
    """Script of this project and its flags, without the interpreter"""
    run: str = ""
    """Run folder of a training; empty for other commands"""


@dataclass(frozen=True)
class Waiting:
    """A job, or one task of an array (numbered from 1), that must succeed before another one starts."""

    job: str
    """Id of a submitted job, or the name of an earlier job of the same submission"""
    task: int | None = None


@dataclass
class Job:
    """A job of one task, or an array of several."""

    name: str
    tasks: list[Task]
    site: Site
    waits_for: list[Waiting] = field(default_factory=list)
    most_running: int = 0
    """Number of tasks of an array that run at the same time; 0 leaves it to the scheduler"""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"--name is '{one_line(self.name, 50)}'; begin it with a letter, and use letters, digits and . + - _"
            )

    @property
    def log(self) -> str:
        """Path of the output, with the scheduler's placeholders for the id of the job and the number of the task."""
        task = len(self.tasks) > 1
        if self.site.scheduler == "lsf":
            return f"{self.site.log_dir}/{self.name}-%J{'_%I' if task else ''}.out"
        return f"{self.site.log_dir}/{self.name}-{'%A_%a' if task else '%j'}.out"


def job_script(job: Job, folder: Path, submitted: Sequence[str] = ()) -> str:
    """Return the script of a job, which `sbatch` or `bsub <` takes.

    Args:
        folder: the folder that the command is run in.
        submitted: names of jobs whose ids are not known yet. If this job waits for one of them, its script contains no
            dependency: the script that submits them all adds it.
    """
    site = job.site
    ids_are_known = all(waiting.job not in submitted for waiting in job.waits_for)
    start = [*shlex.split(site.container), site.python]
    return _render(
        site.template or f"{site.scheduler}.sh.jinja",
        name=job.name,
        site=site,
        folder=str(folder),
        log=job.log,
        tasks=[{"run": task.run, "command": [*start, *task.words]} for task in job.tasks],
        most_running=job.most_running,
        dependency=dependency(site.scheduler, job.waits_for) if job.waits_for and ids_are_known else "",
        requeue=[*start, str(CODE / REQUEUE), "--log_dir", site.log_dir],
    )


def submission_script(jobs: Sequence[Job], folder: Path) -> str:
    """Return a script that submits these jobs in order and prints a line `NAME ID` for each of them."""
    site, name, names = jobs[0].site, jobs[-1].name, [job.name for job in jobs]
    variables = {job: f"job_{number}" for number, job in enumerate(names, 1)}
    described = [
        {
            "name": job.name,
            "variable": variables[job.name],
            "script": job_script(job, folder, names),
            "dependency": _flags(site.scheduler, job.waits_for, variables),
        }
        for job in jobs
    ]
    log = f"{site.log_dir}/{name}-submission.out"
    header = {
        "slurm": f"#SBATCH --job-name={name}-submission --ntasks=1 --time=00:10:00 --output={log}",
        "lsf": f"#BSUB -J {name}-submission\n#BSUB -n 1\n#BSUB -W 0:10\n#BSUB -o {log}",
    }[site.scheduler]
    return _render(
        "submission.sh.jinja",
        header=header,
        name=name,
        scheduler=site.scheduler,
        folder=str(folder),
        jobs=described,
    )


def dependency(scheduler: str, waits_for: Sequence[Waiting]) -> str:
    """Return the condition "all of these have succeeded" as the scheduler writes it."""
    if scheduler == "lsf":
        ids = (f"{one.job}[{one.task}]" if one.task else one.job for one in waits_for)
        return " && ".join(f"done({number})" for number in ids)
    return ":".join(["afterok", *(f"{one.job}_{one.task}" if one.task else one.job for one in waits_for)])


def _flags(scheduler: str, waits_for: Sequence[Waiting], variables: dict[str, str]) -> str:
    """Return the flags of a job that waits for jobs whose ids are in variables of the shell; empty for others."""
    if not any(one.job in variables for one in waits_for):
        return ""
    named = [Waiting(f"${{{variables[one.job]}}}" if one.job in variables else one.job, one.task) for one in waits_for]
    condition = dependency(scheduler, named)
    if scheduler == "lsf":
        return f'-w "{condition}"'
    return f'--dependency="{condition}" --kill-on-invalid-dep=yes'


def _render(template: str, **values: Any) -> str:
    import jinja2

    own = Path(template).expanduser()
    shipped = shipped_path(CLUSTER_FILES)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([own.parent, shipped]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["quoted"] = shlex.quote
    environment.filters["words"] = shlex.join
    try:
        return environment.get_template(own.name).render(values)
    except jinja2.TemplateNotFound:
        raise UserError(
            f"the template {located(template)} does not exist; copy one from {shipped}, or leave `template` out"
        ) from None
    except (jinja2.TemplateError, OSError) as error:
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise UserError(f"the template {template}{line} cannot be used ({one_line(error, 200)}); correct it") from None
