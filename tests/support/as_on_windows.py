"""Run a script of this project without what Python lacks on Windows.

    python as_on_windows.py training.train_autoencoder --output_dir …

Processes are started as new interpreters, so what is passed to them must be picklable. They run this file as well.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import random  # noqa: F401 - the standard library uses some of the functions below if they exist when it is imported
import signal
import sys

MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "pty")
SIGNALS = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL", "SIGSTOP", "SIGCONT", "SIGALRM", "SIGPIPE", "SIGQUIT", "SIGCHLD")
FUNCTIONS = ("sched_getaffinity", "sched_setaffinity", "register_at_fork", "killpg", "setsid", "geteuid", "mkfifo")


def remove() -> None:
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for module, names in ((signal, (*SIGNALS, "pthread_kill")), (os, FUNCTIONS)):
        for name in names:
            # On Linux, PyTorch and the standard library themselves need two of the signals.
            if hasattr(module, name) and name not in ("SIGCHLD", "SIGKILL"):
                delattr(module, name)


if __name__ in ("__main__", "__mp_main__"):
    # Other libraries need some of them for Linux when they are imported.
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import psutil  # noqa: F401
    from diffusers import AutoencoderKL, DDPMPipeline, UNet2DConditionModel, UNet2DModel  # noqa: F401
    from transformers import CLIPTextModel, PreTrainedTokenizerFast  # noqa: F401

    remove()

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    module = importlib.import_module(sys.argv[1])
    sys.argv = sys.argv[1:]
    from pipelines.tools.cli import entry_point

    entry_point(module.main)
