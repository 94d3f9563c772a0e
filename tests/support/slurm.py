"""A real Slurm on this machine, with one node: its daemons, and functions that ask it.

Debian's packages slurm-wlm and munge; as root, and without a database. Everything is in one folder, on ports that are
free, so that another Slurm on the machine is not disturbed.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo")
CPUS = 8
CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
# A requeued job starts again when its credential has expired, after two minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
# The node has more CPUs than the machine, so that jobs of several processes run at the same time.
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=short Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_for_slurm() -> str:
    """Return why Slurm cannot be started here; an empty string if it can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"needs Slurm (apt-get install slurm-wlm munge): there is no {absent[0]}"
    return "" if hasattr(os, "geteuid") and os.geteuid() == 0 else "starting Slurm's daemons needs root"


class Slurm:
    """A running Slurm."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}

    def ask(self, *words: str) -> str:
        return subprocess.run(
            words, env={**os.environ, **self.environment}, capture_output=True, text=True, check=True
        ).stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm knows about a job, or about one task of an array (12_1)."""
        words = self.ask("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, *states: str, seconds: float = 180) -> dict[str, str]:
        """Wait until a job has one of these states (default: it is over), and return what Slurm knows about it."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in wanted:
            assert time.monotonic() < deadline, f"{job}\n{self.log('slurmctld')}\n{self.log('slurmd')}"
            time.sleep(0.1)
        return job

    def log(self, daemon: str) -> str:
        return "\n".join((self.folder / f"{daemon}.log").read_text(errors="replace").splitlines()[-30:])


@contextmanager
def running_slurm(folder: Path) -> Iterator[Slurm]:
    """Start the daemons, and end them and their jobs afterwards."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname().split(".")[0]
    config = CONFIG.format(host=host, folder=folder, ports=_free_ports(2), cpus=CPUS)
    (folder / "slurm.conf").write_text(config, encoding="utf-8")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    slurm = Slurm(folder)
    variables = {**os.environ, **slurm.environment}
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    subprocess.run(["munged", "--force", *munge, f"--socket={folder}/munge.socket"], env=variables, check=True)
    daemons = [
        subprocess.Popen([name, "-D", "-c"], env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name in ("slurmctld", "slurmd")
    ]
    try:
        deadline = time.monotonic() + 60
        while _state_of_node(slurm) != "idle":
            assert time.monotonic() < deadline, f"{slurm.log('slurmctld')}\n{slurm.log('slurmd')}"
            time.sleep(0.2)
        yield slurm
    finally:
        subprocess.run(["scancel", "--user=root"], env=variables, capture_output=True)
        _wait_for_no_jobs(slurm)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        subprocess.run(["munged", "--stop", f"--socket={folder}/munge.socket"], env=variables, capture_output=True)


def _state_of_node(slurm: Slurm) -> str:
    try:
        return slurm.ask("sinfo", "--noheader", "--format=%t")
    except subprocess.CalledProcessError:  # the controller is not listening yet
        return ""


def _wait_for_no_jobs(slurm: Slurm) -> None:
    deadline = time.monotonic() + 45
    while time.monotonic() < deadline:
        try:
            if not slurm.ask("squeue", "--noheader"):
                return
        except subprocess.CalledProcessError:
            return
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
