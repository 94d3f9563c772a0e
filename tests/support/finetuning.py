"""Runs of finetune_decoder.py that lack their report, and stages that record which posters each process generates."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from pipelines.tools.cli import ReportedError
from tests.conftest import forget_accelerate
from training import finetune_decoder
from training.core.parsing import parse_config
from training.engine.session import train

REPORT = ("finetuning.json", "finetuning.md", "before_after.png")


class Recorded(finetune_decoder.FinetuningStage):
    """Writes the number of each poster into a file of this process, and can take a while for each batch of them."""

    seconds = 0.0
    slow_ranks: tuple[int, ...] = (0, 1)

    def _images_of(self, pipeline, conditions, exchange, count):
        def recorded(numbers):
            with Path(self.config.output_dir, f"generated_{exchange.rank}.txt").open("a", encoding="utf-8") as file:
                file.writelines(f"{number}\n" for number in numbers)
            time.sleep(self.seconds if exchange.rank in self.slow_ranks else 0)
            return conditions(numbers)

        return super()._images_of(pipeline, recorded, exchange, count)


class Slow(Recorded):
    seconds = 60.0


class SlowSecond(Slow):
    """The first process waits for the second one."""

    slow_ranks = (1,)


def unfinished(launched: Path, folder: Path) -> Path:
    """Return a run that is trained and saved, but lacks its report and its exported pipeline."""
    shutil.copytree(launched, folder, symlinks=True)
    shutil.rmtree(folder / "pipeline")
    for name in (*REPORT, "record.json"):
        (folder / name).unlink()
    return folder


def session(stage: type[Recorded], flags: list[str], run: Path, processes: int) -> Callable[[], int]:
    """Return a session for each process, which generates 10 posters, 4 at a time in every case."""
    shape = ("--gradient_accumulation_steps", str(2 // processes), "--evaluation_images", "10")

    def action() -> int:
        forget_accelerate()
        words = [*flags, *shape, "--output_dir", str(run)]
        try:
            return train(stage, parse_config(finetune_decoder.Config, words))
        except ReportedError as error:  # an exchange failed before this process knew that the other one was stopped
            return error.status  # as `entry_point` does

    return action


def generated(run: Path, rank: int) -> list[int]:
    return [int(number) for number in (run / f"generated_{rank}.txt").read_text().split()]


def assert_same_report(run: Path, other: Path) -> None:
    assert (run / "finetuning.json").read_bytes() == (other / "finetuning.json").read_bytes()
    assert (run / "finetuning.md").read_bytes() == (other / "finetuning.md").read_bytes()
    with Image.open(run / "before_after.png") as own, Image.open(other / "before_after.png") as its:
        assert list(own.getdata()) == list(its.getdata())
    assert "finetuning" in json.loads((run / "record.json").read_text())
