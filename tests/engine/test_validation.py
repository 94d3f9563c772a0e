"""Validation on several processes: the same metrics as on one, bit for bit, for sizes that do not divide."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import forget_accelerate
from tests.support.ranks import forked_ranks
from tests.support.toy import ToyConfig, ToyStage
from training.core.stage import StageContext
from training.engine.launch import start_accelerator
from training.engine.validation import validate


def measured(folder: Path, processes: int) -> dict[str, float]:
    """Return the metrics that each of the processes has measured of a stage with the same weights.

    It has seven rows: four batches of two, the last one of a single row.
    """

    def action() -> int:
        forget_accelerate()
        accelerator = start_accelerator(ToyConfig(cpu_threads=1))
        stage = ToyStage(ToyConfig(dropout=0), StageContext(accelerator.device))
        metrics = validate(stage, accelerator, seed=3, batch_size=2, poll=lambda: None)
        (folder / f"{accelerator.process_index}.json").write_text(json.dumps(metrics))
        return 0

    folder.mkdir()
    forked_ranks(action, folder / "output.txt", processes)
    first, *others = (json.loads(file.read_text()) for file in sorted(folder.glob("*.json")))
    assert len(others) == processes - 1
    assert all(other == first for other in others)
    return first


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_validation_metrics_are_those_of_one_process_bit_for_bit(tmp_path, processes):
    one = measured(tmp_path / "one", 1)
    assert one
    assert measured(tmp_path / "several", processes) == one
