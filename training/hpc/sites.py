"""The settings of a cluster: a YAML file that a site writes once, whose values the flags of a submission replace."""

from __future__ import annotations

import dataclasses
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from pipelines.tools.cli import UserError, nearest, one_line
from pipelines.tools.resources import find_file
from training.core.settings import read_settings

SCHEDULERS = ("slurm", "lsf")
PARALLELISM = ("ddp", "fsdp2")
CLUSTER_FILES = "configs/cluster"
_TIME = re.compile(r"(?:(\d+)-)?(\d{1,4}):(\d{2})(?::(\d{2}))?")
_VARIABLE = re.compile(r"[A-Za-z_]\w*")
_AT_LEAST = {"nodes": 1, "gpus_per_node": 0, "processes_per_node": 0, "cpus_per_process": 1, "warning_seconds": 60}


@dataclass(frozen=True)
class Site:
    """What a job asks for, and what is done before its command; configs/cluster/site.yaml explains each setting."""

    scheduler: str = "slurm"
    nodes: int = 1
    gpus_per_node: int = 1
    processes_per_node: int = 0
    parallelism: str = "ddp"
    cpus_per_process: int = 4
    memory_per_node: str = ""
    time: str = "04:00:00"
    warning_seconds: int = 120
    partition: str = ""
    account: str = ""
    qos: str = ""
    gpu_type: str = ""
    options: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    container: str = ""
    python: str = sys.executable
    template: str = ""
    log_dir: str = "runs/hpc"

    def __post_init__(self) -> None:
        if self.scheduler not in SCHEDULERS:
            raise UserError(
                f"scheduler is '{self.scheduler}'{nearest(self.scheduler, SCHEDULERS)}; use {' or '.join(SCHEDULERS)}"
            )
        if self.parallelism not in PARALLELISM:
            raise UserError(
                f"parallelism is '{self.parallelism}'{nearest(self.parallelism, PARALLELISM)}; use "
                f"{' or '.join(PARALLELISM)}"
            )
        for name, least in _AT_LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.warning_seconds >= self.seconds:
            raise UserError(
                f"warning_seconds is {self.warning_seconds}, and the time limit {self.time} is not longer; "
                "ask for more time"
            )
        if self.scheduler == "lsf" and self.warning_minutes >= self.limit_minutes:
            raise UserError(
                f"warning_seconds is {self.warning_seconds}, and the time limit {self.time}. LSF counts in minutes: "
                f"the warning {self.warning_minutes} minutes before a limit of {self.limit_minutes} would come at the "
                "start; ask for more time"
            )
        for name in self.environment:
            if not _VARIABLE.fullmatch(name):
                raise UserError(f"environment has the name '{one_line(name, 50)}'; use letters, digits and _")

    @property
    def seconds(self) -> int:
        """The time limit in seconds. Raises UserError."""
        match = _TIME.fullmatch(self.time)
        if match is None:
            raise UserError(f"time is '{self.time}'; write it as HH:MM:SS or D-HH:MM:SS, for example 04:00:00")
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds

    @property
    def limit_minutes(self) -> int:
        """The time limit in minutes, rounded up, as Slurm does by itself. Raises UserError."""
        return (self.seconds + 59) // 60

    @property
    def warning_minutes(self) -> int:
        """The minutes before the time limit at which the run is asked to save, rounded up."""
        return (self.warning_seconds + 59) // 60

    @property
    def processes(self) -> int:
        """Number of processes on each node: one for each GPU unless the site says otherwise."""
        return self.processes_per_node or max(1, self.gpus_per_node)

    def of_one_process(self) -> Site:
        """Return the site for a command that is a single process."""
        site = dataclasses.replace(self, nodes=1, gpus_per_node=min(1, self.gpus_per_node), processes_per_node=1)
        return site.without_training()

    def without_training(self) -> Site:
        """Return the site for a command that trains nothing, and therefore shards no weights."""
        return dataclasses.replace(self, parallelism=PARALLELISM[0])

    def check_training(self) -> None:
        """Raise UserError if a training cannot be started with these settings."""
        if self.parallelism == "fsdp2" and self.nodes * self.processes == 1:
            raise UserError(
                "parallelism is fsdp2, which divides the weights among several processes, and the job has one; ask for "
                "more with --gpus_per_node or --nodes, or use ddp"
            )


def read_site(path: str | Path | None, flags: dict[str, Any]) -> Site:
    """Return the settings of a YAML file, where `flags` replace those that they give (None gives nothing).

    Raises:
        UserError: the file cannot be read, or a setting is unknown, of another type, or out of its bounds.
    """
    values = read_settings(find_file(path, CLUSTER_FILES)) if path else {}
    known = get_type_hints(Site)
    for name, value in values.items():
        if name not in known:
            raise UserError(f"unknown setting '{name}' in {path}{nearest(name, known)}; see configs/cluster/site.yaml")
        values[name] = _checked(name, value, known[name], path)
    return Site(**{**values, **{name: value for name, value in flags.items() if value is not None}})


def _checked(name: str, value: Any, kind: Any, path: str | Path | None) -> Any:
    """Return a value of the type that its setting has; YAML reads 04:00:00 without quotation marks as a number."""
    if name == "time" and isinstance(value, int) and not isinstance(value, bool):
        return f"{value // 3600}:{value // 60 % 60:02d}:{value % 60:02d}"
    if kind is str and isinstance(value, str):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind == list[str] and isinstance(value, list) and all(isinstance(part, str) for part in value):
        return value
    if kind == dict[str, str] and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: str(part) for key, part in value.items()}
    words = {str: "text", int: "a whole number", list[str]: "a list of texts", dict[str, str]: "NAME: value pairs"}
    raise UserError(f"{name} in {path} is {one_line(value, 100)}; give {words[kind]}")
