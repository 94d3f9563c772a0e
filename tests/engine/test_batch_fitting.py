"""Memory that runs out in a step, by a limit of the system: a report, or smaller micro-batches of the same run."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipelines.tools.cli import entry_point
from tests.conftest import forget_accelerate
from tests.support.child import in_child
from tests.support.ranks import fork_ranks
from tests.support.runs import assert_same_state, relative_difference
from tests.support.toy import main as toy_main
from training.core.layout import BatchLayout
from training.core.memory import is_out_of_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process as Linux does")

COMMON = ("--report_to", "none", "--cpu_threads", "1", "--logging_steps", "1", "--preview_epochs", "0",
          "--num_train_epochs", "1", "--checkpointing_steps", "2", "--double", "true", "--dropout", "0")  # fmt: skip
# Eight images need 1,600 MiB, and four of them 800.
LIMITED = ("--image_mib", "200", "--free_mib", "1200")
LARGE, SMALL = ("--train_batch_size", "8"), ("--train_batch_size", "4", "--gradient_accumulation_steps", "2")
AUTO = ("--auto_batch_size", "true")


def run(folder: Path, *flags: str) -> tuple[int, str]:
    """Run in a process of its own, as a limit cannot be taken back; return its status and what it printed."""

    return in_child(session(folder, *flags), folder.with_suffix(".txt"))


def session(folder: Path, *flags: str) -> Callable[[], None]:
    """Return a function that runs the toy stage as its script does, and ends the process."""

    def action() -> None:
        forget_accelerate()
        entry_point(lambda: toy_main(["--output_dir", str(folder), *COMMON, *flags]))

    return action


def finish(folder: Path, *flags: str) -> str:
    status, text = run(folder, *flags)
    assert status == 0, text
    return text


def fitted(folder: Path) -> int:
    return json.loads((folder / "batch.json").read_text())["train_batch_size"]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "run"
    finish(folder, *SMALL)
    return folder


def test_the_run_is_the_one_with_the_small_batch_and_begins_with_it_when_it_is_resumed(tmp_path, small):
    text = finish(tmp_path / "run", *LARGE, *LIMITED, *AUTO)
    assert "continues with --train_batch_size 4 --gradient_accumulation_steps 2 (the global batch is still 8)" in text
    assert_same_state(tmp_path / "run", small)
    assert fitted(tmp_path / "run") == 4
    text = finish(tmp_path / "run", *LARGE, *LIMITED, *AUTO, "--extra_epochs", "1")
    assert "as an earlier session found that more does not fit" in text
    assert "ran out" not in text
    longer = shutil.copytree(small, tmp_path / "longer", symlinks=True)
    finish(longer, *SMALL, "--extra_epochs", "1")
    assert_same_state(tmp_path / "run", longer)


def test_a_later_step_that_does_not_fit_is_repeated_with_the_small_batch(tmp_path):
    text = finish(tmp_path / "run", *LARGE, *LIMITED, *AUTO, "--image_mib_step", "4", "--critic", "true")
    assert "ran out when step 4 was taken" in text
    finish(tmp_path / "small", *SMALL, "--critic", "true")
    assert relative_difference(tmp_path / "run", tmp_path / "small", ["*.safetensors"]) < 1e-12


def test_a_report_says_what_took_the_memory_and_what_to_lower(tmp_path, small):
    status, text = run(tmp_path / "run", *LARGE, *LIMITED, "--image_mib_step", "4")
    assert status == 2
    assert "Traceback" not in text
    (message,) = [line for line in text.splitlines() if "ran out" in line]
    for part in (
        "the memory of the machine ran out when step 4 was taken (phase 'denoiser', --train_batch_size 8: image",
        "image 8×1×8×8", "allocate 1677721600 bytes", "had used up to", "optimizer take about", " at 8×8",
        "--train_batch_size 4 --gradient_accumulation_steps 2", "--auto_batch_size true", "resume",
    ):  # fmt: skip
        assert part in message, part
    finish(tmp_path / "run", *SMALL, *LIMITED)
    assert relative_difference(tmp_path / "run", small) < 1e-12


def test_one_image_that_does_not_fit_ends_the_run(tmp_path):
    status, text = run(tmp_path / "run", *LARGE, *AUTO, "--image_mib", "500", "--free_mib", "300")
    assert status == 2
    assert "Not even one image fits: lower --resolution" in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_two_processes_agree_although_only_one_has_too_little_memory(tmp_path):
    """At the start they divide the batch together; in a later step the run ends, and resumes with a smaller batch."""
    critic = ("--critic", "true")
    whole, parts, start = (tmp_path / name for name in ("whole", "parts", "start"))
    # Four images need 1,600 MiB, and two of them 800.
    memory = ("--image_mib", "400", "--free_mib", "1200", "--limited_rank", "1")
    limited = (*critic, "--train_batch_size", "4", *memory, *AUTO)
    statuses, text = fork_ranks(session(parts, *limited, "--image_mib_step", "4"), tmp_path / "later.txt", 2)
    assert statuses == [2, 2], text
    assert text.count("ran out when step 4") == 1
    assert "it resumes with --train_batch_size 2 --gradient_accumulation_steps 2" in text
    assert "Traceback" not in text
    small = (*critic, "--train_batch_size", "2", "--gradient_accumulation_steps", "2")
    for folder, flags in ((start, limited), (parts, limited), (whole, small)):
        statuses, text = fork_ranks(session(folder, *flags), folder.with_suffix(".txt"), 2)
        assert statuses == [0, 0], text
    assert_same_state(start, whole)
    assert relative_difference(parts, whole) < 1e-12


def test_errors_of_the_allocators_are_recognized():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(("size", "sizes"), [(8, [4, 2, 1]), (6, [3, 1]), (7, [1]), (1, [])])
def test_each_smaller_layout_has_the_same_global_batch(size, sizes):
    layout, found = BatchLayout(size, num_processes=2, gradient_accumulation_steps=3, rank=1), []
    while (smaller := layout.smaller()) is not None:
        assert smaller.global_batch_size == layout.global_batch_size
        layout = smaller
        found.append(layout.train_batch_size)
    assert found == sizes
