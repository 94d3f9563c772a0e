"""Fixtures for the whole suite."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

# One thread per test process: tiny models only lose time to thread starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="halftone-datasets-"))

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real pictures and a pretrained VAE beside the checkout; tests that want them skip elsewhere."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("no ../shared beside the checkout")
    return path


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """Accelerate keeps the first run's precision and topology for the whole process."""
    yield
    forget_accelerate()


def forget_accelerate() -> None:
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
