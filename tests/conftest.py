"""Fixtures for the whole suite."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

# One thread per test process: for tiny models, starting threads takes longer than they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "HF_DATASETS_CACHE" not in os.environ:  # child processes inherit it
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="halftone-datasets-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

# Children inherit which signals are ignored: SIGINT in background jobs of a shell, SIGHUP under nohup. Tests send both.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with real images and a pretrained VAE next to the checkout; tests that need it are skipped without it."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("needs ../shared next to the checkout")
    return path


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """Reset Accelerate after each test: it keeps the precision and topology of the first run in a process."""
    yield
    forget_accelerate()


def forget_accelerate() -> None:
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
