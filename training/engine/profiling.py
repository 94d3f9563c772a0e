"""`--profile_steps`: a trace of some training steps, which shows what the device and the processor did at what time."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from training.core.files import WRITING
from training.core.informing import Informing
from training.core.options import Options, option

logger = logging.getLogger("halftone")

PROFILE_FILE = "profile.json"
# The first steps of a session allocate memory and choose kernels; they are not typical of the rest.
WARM_UP_STEPS = 3


@dataclass
class ProfileConfig(Options):
    """The trace of some steps."""

    profile_steps: int = option(0, on_resume="free", at_least=0)
    """Write a trace of N training steps, after the first three of the session, to profile.json in the run folder;
    open it at https://ui.perfetto.dev. 0 writes none"""


class StepProfiler:
    """Traces some steps of a session: a context manager around them, whose `step_done` is called after each of them.

    Args:
        steps: number of steps to trace; 0 traces none.
        remaining: number of steps of the session. If it is small, there are fewer steps before the trace, and in it.
        folder: folder of the trace.
    """

    def __init__(self, steps: int, remaining: int, folder: Path, device: torch.device):
        self.steps, self.file, self.device = min(steps, remaining), folder / PROFILE_FILE, device
        self._before = min(WARM_UP_STEPS, remaining - self.steps)
        self._done = 0
        self._profile: Any = None
        self._informing = Informing()

    def __enter__(self) -> StepProfiler:
        self._start_if_due()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        if self._profile is not None:  # the session ends before the trace is complete
            self._write()

    def step_done(self) -> None:
        self._done += 1
        if self._profile is not None and self._done == self._before + self.steps:
            self._write()
        self._start_if_due()

    def _start_if_due(self) -> None:
        if not self.steps or self._done != self._before:
            return
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities, record_shapes=True)
        self._profile.start()

    def _write(self) -> None:
        traced, self._profile = self._profile, None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the work of the last steps belongs to the trace
        with self._informing(self.file.name):
            traced.stop()
            unfinished = self.file.with_name(f"{WRITING}{os.getpid()}-{self.file.name}")
            traced.export_chrome_trace(str(unfinished))
            os.replace(unfinished, self.file)
            logger.info(
                "a trace of %d steps was written to %s; open it at https://ui.perfetto.dev",
                self._done - self._before,
                self.file,
            )
