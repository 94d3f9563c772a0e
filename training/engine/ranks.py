"""The processes of a run learn that one of them ended or no longer responds, and all of them end for that reason.

An exchange of tensors cannot tell: it waits for the missing process for hours, or fails with the words of its library.
Therefore each process writes to the key-value store of torch.distributed that it is alive, and why it ends. The end of
a process on the same computer is noticed within seconds, also while no process waits for another (`local_ranks.py`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pipelines.tools.cli import INTERRUPTED_STATUS, USER_ERROR_STATUS, ReportedError, UserError, cause, print_error
from training.engine.local_ranks import LocalRanks
from training.engine.signals import Interrupted, StopSignal

if TYPE_CHECKING:
    from torch.distributed import Store

_ENDED = "ended"
_BEAT_SECONDS = 0.5
# How often, and for how long, the processes on the same computer are looked for at the start.
_SEEKING_EVERY_SECONDS, _SEEKING_SECONDS = 0.02, 2.0
_STORE_SECONDS = 10.0
# How long a process that learns of an error elsewhere may take to end by itself.
_GRACE_SECONDS = 1.0
# An exchange fails when another process ends; the reason may be in the store a moment later.
_REASON_SECONDS = 3.0
# A process that has ended may have told why, or be missed in an exchange, before the others end because of it.
_ENDED_SECONDS = 5.0
_NO_MESSAGE = (
    "another process of this run ended without a message (it may have been killed because the memory was full; the "
    "lines above and the system's log can tell). Run the same command again to resume from the last checkpoint"
)
_EXCHANGE_FAILED = re.compile(r"gloo|nccl|connection (was )?(closed|reset)|broken pipe|peer|socket", re.IGNORECASE)


class RankWatch:
    """Watches the other processes of a run; a context manager around all that they do together.

    With a single process it does nothing. If its block ends with an error, all processes end with the same exit status,
    and one of them prints the error.

    Args:
        patience: seconds without a sign of life after which a process counts as lost, and the others end.
    """

    def __init__(self, rank: int, num_processes: int, stop: StopSignal, *, patience: float):
        self.rank, self.num_processes, self.stop, self.patience = rank, num_processes, stop, patience
        self._store: Store | None = None
        self._over = threading.Event()
        self._has_announced = False
        self._announcing = threading.Lock()

    def __enter__(self) -> RankWatch:
        if self.num_processes > 1 and "MASTER_ADDR" in os.environ:
            self._store, watched = connect(self.rank)
            self.stop.on_last_resort = self._announce_stop
            neighbours = LocalRanks(self.rank, self.num_processes, watched)
            threading.Thread(target=self._watch, args=(watched, neighbours), name="ranks", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._store is None:
            return
        try:
            if isinstance(error, Interrupted):
                self._announce_stop(self.stop.exit_status(self.stop.requested or 0))
            elif isinstance(error, Exception):
                self._end_with(error)
            elif error is None:
                self._finish()
        finally:
            self._over.set()
            self.stop.on_last_resort = None

    def wait_for_all(self) -> None:
        """Wait until every process has called this, or until one of them has ended; for processes without exchanges.

        Raises:
            Interrupted: this process was asked to stop.
        """
        if self._store is None:
            return
        self._store.set(f"done/{self.rank}", "1")
        keys = [f"done/{rank}" for rank in range(self.num_processes)]
        while not self._store.check(keys):
            self.stop.check()
            time.sleep(0.1)
        # The first process may own the store, so it stays until the others have seen the last key.
        if self._store.add("seen", 1) < self.num_processes and self.rank == 0:
            deadline = time.monotonic() + _REASON_SECONDS
            while self._store.add("seen", 0) < self.num_processes and time.monotonic() < deadline:
                time.sleep(0.05)

    def _finish(self) -> None:
        """Tell the others that this process has done its part, so that they do not miss it."""
        assert self._store is not None
        with contextlib.suppress(Exception):  # the process that owns the store is gone
            self._store.set(_finished(self.rank), "1")
            # The first process may own the store, so it stays until the others have read this.
            keys = [_finished(rank) for rank in range(self.num_processes)]
            deadline = time.monotonic() + _REASON_SECONDS
            while self.rank == 0 and time.monotonic() < deadline and not self._store.check(keys):
                time.sleep(0.02)

    def _end_with(self, error: Exception) -> None:
        """Tell the others of an error; raise ReportedError if one of them has told this process of another error."""
        if _is_failed_exchange(error):
            announced = self._announced(_REASON_SECONDS)
            if announced is not None:
                if not announced["message"]:  # another process was asked to stop
                    self._leave()
                raise ReportedError(announced["message"], announced["status"]) from None
            error = UserError(_NO_MESSAGE)
        status = USER_ERROR_STATUS if isinstance(error, UserError) else 1
        first = self._announce(status, str(error) if status == USER_ERROR_STATUS else cause(error))
        if status == USER_ERROR_STATUS and first:
            print_error(error)
        self._stay_for_the_others()
        if status == USER_ERROR_STATUS:
            raise ReportedError(str(error), status) from None

    def _announce_stop(self, status: int) -> None:
        self._announce(status, "")
        self._leave()
        self._stay_for_the_others()

    def _leave(self) -> None:
        """Let the run say that it was stopped; an error of this must not keep the process from ending."""
        leave, self.stop.on_leaving = self.stop.on_leaving, None
        if leave is not None:
            with contextlib.suppress(Exception):
                leave()

    def _stay_for_the_others(self) -> None:
        """Wait, for at most `_REASON_SECONDS`, until all other processes know that this one ends.

        Only the first process waits, because the store may end with it.
        """
        assert self._store is not None
        keys = [_left(rank) for rank in range(1, self.num_processes)]
        deadline = time.monotonic() + _REASON_SECONDS
        with contextlib.suppress(Exception):  # the process that owns the store is gone
            while self.rank == 0 and time.monotonic() < deadline and not self._store.check(keys):
                time.sleep(0.05)

    def _announce(self, status: int, message: str) -> bool:
        """Write to the store that this process ends; return whether it is the first one."""
        assert self._store is not None
        with self._announcing:
            if self._has_announced:  # by another thread
                return False
            self._has_announced = True
        with contextlib.suppress(Exception):  # the process that owns the store is gone, and so are the others
            value = json.dumps({"status": status, "message": message, "rank": self.rank})
            written = json.loads(self._store.compare_set(_ENDED, "", value))
            self._store.set(_left(self.rank), "1")
            return written["rank"] == self.rank
        return True

    def _announced(self, seconds: float) -> dict[str, Any] | None:
        """Return what a process has written about its end, waiting for some seconds."""
        assert self._store is not None
        deadline = time.monotonic() + seconds
        with contextlib.suppress(Exception):  # the store's owner is gone
            while time.monotonic() < deadline:
                if self._store.check([_ENDED]):
                    return json.loads(self._store.get(_ENDED))
                time.sleep(0.1)
        return None

    def _watch(self, store: Store, neighbours: LocalRanks) -> None:
        """Tell the others that this process is alive, and end when one of them does."""
        # The first process watches all others, and they watch the first: one of each pair suffices to end them all.
        others = range(1, self.num_processes) if self.rank == 0 else range(1)
        last, missed, finished = dict.fromkeys(others, -1), dict.fromkeys(others, 0.0), set[int]()
        ended: dict[int, float] = {}  # for how long
        # The end of a process is noticed only if it was seen before, so they are looked for at once.
        deadline = time.monotonic() + _SEEKING_SECONDS
        while not neighbours.are_known(store) and time.monotonic() < deadline:
            if self._over.wait(_SEEKING_EVERY_SECONDS):
                break
        while not self._over.wait(_BEAT_SECONDS):
            beats, began = last, time.monotonic()
            with contextlib.suppress(Exception):  # the process that owns the store is frozen or gone
                store.add(f"beats/{self.rank}", 1)
                if store.check([_ENDED]):
                    store.set(_left(self.rank), "1")
                    self._follow(json.loads(store.get(_ENDED)))
                    return
                beats = {rank: store.add(f"beats/{rank}", 0) for rank in others}
                # The first process, which may own the store, can leave as soon as the others know that it is done.
                quiet = {rank for rank in others if rank == 0 or beats[rank] == last[rank]}
                finished |= {rank for rank in {*quiet, *ended} - finished if store.check([_finished(rank)])}
            # Own beats are counted, not the time: a computer that was suspended as a whole has lost no process.
            seconds = _BEAT_SECONDS + min(_STORE_SECONDS, time.monotonic() - began)
            for rank in set(others) - finished:
                missed[rank] = 0.0 if beats[rank] != last[rank] else missed[rank] + seconds
                if missed[rank] > self.patience:
                    self._give_up(self._silence_of(rank))
            last = beats
            for rank in neighbours.ended(store):
                ended[rank] = ended.get(rank, 0.0) + seconds
                if rank not in finished and ended[rank] > _ENDED_SECONDS:
                    self._give_up(_NO_MESSAGE)

    def _follow(self, announced: dict[str, Any]) -> None:
        """End as another process did: stop if it was asked to stop, or end with the same status after an error."""
        if self._has_announced:
            return
        if not announced["message"]:
            self.stop.request_here(signal.SIGINT if announced["status"] == INTERRUPTED_STATUS else signal.SIGTERM)
        elif not self._over.wait(_GRACE_SECONDS) and not self._has_announced:
            _end_process(announced["status"])

    def _silence_of(self, rank: int) -> str:
        return (
            f"process {rank + 1} of {self.num_processes} has not responded for {self.patience:.0f} seconds: it is "
            "stopped, or its machine cannot be reached. End it, and run the same command again to resume from the last "
            "checkpoint; --process_timeout sets the number of seconds"
        )

    def _give_up(self, message: str) -> None:
        """End this process and the others, unless its main thread does so already."""
        if self._has_announced:
            return
        if self._announce(USER_ERROR_STATUS, message):
            print_error(UserError(message))
        _end_process(USER_ERROR_STATUS)


def connect(rank: int) -> tuple[Store, Store]:
    """Return two connections to the store of torch.distributed: a thread that waits on one does not block the other."""
    import torch.distributed as dist

    served = dist.is_initialized() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, timeout = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timedelta(seconds=_STORE_SECONDS)

    def store(is_master: bool) -> Store:
        return dist.TCPStore(*address, is_master=is_master, timeout=timeout, wait_for_workers=False)

    first = store(rank == 0 and not served)
    # The launcher may own the store and start the processes again, and a process may train several times.
    session = first.add(f"halftone/sessions/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}", 1)
    prefix = f"halftone/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{session}"
    return dist.PrefixStore(prefix, first), dist.PrefixStore(prefix, store(False))


def _left(rank: int) -> str:
    """Return the key that a process sets when it ends, or knows that another one does."""
    return f"left/{rank}"


def _finished(rank: int) -> str:
    """Return the key that a process sets when it has done its part without an error."""
    return f"finished/{rank}"


def _is_failed_exchange(error: Exception) -> bool:
    from torch.distributed import DistError

    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and _EXCHANGE_FAILED.search(str(error)) is not None
    )


def _end_process(status: int) -> None:
    """End this process although its main thread waits for another one."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(status)
