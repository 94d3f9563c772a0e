"""The processes of a run that are on this computer, by their process ids: the end of one is known within seconds."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from torch.distributed import Store

# A clock that is corrected while the processes start moves the times at which they seem to have been created.
_SAME_SECONDS = 2.0


class LocalRanks:
    """Other processes of a run, as far as they are on this computer.

    A process that this one has never seen by its id is left out: it may be on another computer of the same name, or in
    a container, where it has another id.

    Args:
        rank: of this process; it tells the others its id.
        num_processes: number of all processes.
        store: in which each process writes its id.
    """

    def __init__(self, rank: int, num_processes: int, store: Store):
        own = psutil.Process()
        store.set(_key(rank), json.dumps([socket.gethostname(), own.pid, own.create_time()]))
        self._unknown = set(_ranks_beside(rank, num_processes)) - {rank}
        self._processes: dict[int, psutil.Process] = {}

    def are_known(self, store: Store) -> bool:
        """Look for the processes that have not told their ids before; return whether all have told them."""
        with contextlib.suppress(Exception):  # the process that owns the store is frozen or gone
            for rank in sorted(self._unknown):
                if store.check([_key(rank)]):
                    self._unknown.discard(rank)
                    self._find(rank, *json.loads(store.get(_key(rank))))
        return not self._unknown

    def ended(self, store: Store) -> list[int]:
        """Return the ranks of the processes here that have ended, for whatever reason."""
        self.are_known(store)
        return [rank for rank, process in self._processes.items() if _has_ended(process)]

    def _find(self, rank: int, host: str, pid: int, created: float) -> None:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if host == socket.gethostname() and abs(process.create_time() - created) < _SAME_SECONDS:
                self._processes[rank] = process


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:  # the system does not tell
        return False


def _ranks_beside(rank: int, num_processes: int) -> range:
    """Return the ranks that launchers start on one computer, by the numbers that they give each process."""
    with contextlib.suppress(KeyError, ValueError):
        first = rank - int(os.environ["LOCAL_RANK"])
        return range(max(0, first), min(num_processes, first + int(os.environ["LOCAL_WORLD_SIZE"])))
    return range(0)


def _key(rank: int) -> str:
    return f"process/{rank}"
