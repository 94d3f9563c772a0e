"""What one process of a run knows, all of them learn: its error, its end, and that it no longer responds."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.support.forks import Fork
from tests.support.ranks import outcomes, start_ranks, wait_for
from tests.support.runs import ROOT, TOY, assert_same_state, command, environment, toy
from tests.support.tiny_models import tiny_vae
from training.engine.signals import REQUEUE_STATUS

pytestmark = pytest.mark.slow

FLAGS = ("--report_to", "none", "--cpu_threads", "1", "--train_batch_size", "4", "--num_train_epochs", "2",
         "--checkpointing_steps", "2", "--preview_epochs", "0", "--logging_steps", "1")  # fmt: skip
SLOW = ("--slow_seconds", "0.2")


def started(folder: Path, *flags: str) -> list[Fork]:
    """Start a run of two processes, and wait for its first checkpoint."""
    processes = start_ranks(TOY, ["--output_dir", str(folder), *FLAGS, *SLOW, *flags])
    wait_for(lambda: (folder / "checkpoints/latest").exists(), processes)
    return processes


def assert_both_end_with(processes: list[Fork], message: str) -> None:
    """Both processes end with status 2, and only one of them prints the message, without a traceback."""
    statuses, errors = outcomes(processes)
    assert statuses == [2, 2], errors
    assert errors.count(message) == 1
    assert "Traceback" not in errors


def test_a_row_that_only_the_second_process_cannot_read_ends_both_with_one_message(tmp_path):
    processes = start_ranks(TOY, ["--output_dir", str(tmp_path / "run"), *FLAGS, "--broken_row", "5"])
    assert_both_end_with(processes, "row 5: the image is truncated")


def test_a_bad_image_in_the_share_of_the_second_process_ends_all_that_cache_latents(tmp_path):
    images, vae = tmp_path / "images", tmp_path / "vae"
    images.mkdir()
    for i in range(16):
        Image.new("RGB", (16, 16), (15 * i, 0, 0)).save(images / f"{i:02}.png")
    # The second process checks and encodes this row: the first one does not come upon it while it encodes others.
    (images / "05.png").write_bytes((images / "05.png").read_bytes()[:50])
    tiny_vae().save_pretrained(vae)
    flags = ["--vae", str(vae), "--train_data_dir", str(images), "--output_dir", str(tmp_path / "cache"),
             "--resolution", "16", "--splits", "[train]", "--cpu_threads", "1", "--shard_rows", "4"]  # fmt: skip
    processes = start_ranks(ROOT / "data_scripts/precompute_latents.py", flags)
    assert_both_end_with(processes, "rows cannot be trained on")
    assert not (tmp_path / "cache/cache.json").exists()


def test_a_process_that_is_killed_ends_the_others_with_a_sentence(tmp_path):
    processes = started(tmp_path / "run")
    processes[1].kill()
    statuses, errors = outcomes(processes)
    assert statuses == [2, -signal.SIGKILL]
    assert "another process of this run ended without a message" in errors
    assert "Traceback" not in errors


def test_a_process_that_is_frozen_ends_the_others_after_a_while(tmp_path):
    processes = started(tmp_path / "run", "--process_timeout", "10")
    processes[1].send_signal(signal.SIGSTOP)
    frozen = time.monotonic()
    try:
        processes[0].wait(60)
    finally:
        processes[1].kill()
    assert 8 < time.monotonic() - frozen < 25
    statuses, errors = outcomes(processes)
    assert statuses[0] == 2
    assert "process 2 of 2 has not responded for 10 seconds" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("part", ["previews", "finish"])
def test_a_process_that_is_killed_while_the_first_one_works_alone_ends_it_within_seconds(tmp_path, part):
    """Nothing is exchanged meanwhile: the first process would notice it after an hour."""
    flags = [*FLAGS, "--max_train_steps", "1", "--long_part", part, "--signal_rank", "0"]
    processes = start_ranks(TOY, ["--output_dir", str(tmp_path / "run"), *flags])
    wait_for(lambda: f"long part: {part}" in processes[0].stdout, processes)
    processes[1].kill()
    killed = time.monotonic()
    statuses, errors = outcomes(processes, 60)
    assert time.monotonic() - killed < 30
    assert statuses == [2, -signal.SIGKILL]
    assert errors.count("another process of this run ended without a message") == 1
    assert "Traceback" not in errors


def test_a_process_that_has_done_its_part_is_not_missed(tmp_path):
    """Each watches the other one while the first works for longer than the end of a process may go unnoticed."""
    script = tmp_path / "apart.py"
    script.write_text(
        "import os, sys, time\n"
        "from training.engine.ranks import RankWatch\n"
        "from training.engine.signals import StopSignal\n"
        "rank = int(os.environ['RANK'])\n"
        "with StopSignal() as stop, RankWatch(rank, 3, stop, patience=10):\n"
        "    time.sleep((14, 0, 12)[rank])\n"
    )
    statuses, errors = outcomes(start_ranks(script, [], 3))
    assert statuses == [0, 0, 0], errors


def test_long_work_of_the_main_process_alone_does_not_end_those_that_wait_for_it(tmp_path):
    """Its share of the previews takes longer than a process may be silent."""
    flags = [*FLAGS, "--process_timeout", "10", "--long_part", "previews", "--long_seconds", "14", "--signal_rank", "0"]
    processes = start_ranks(TOY, ["--output_dir", str(tmp_path / "run"), *flags, "--max_train_steps", "1"])
    statuses, errors = outcomes(processes, 300)
    assert statuses == [0, 0], errors
    assert (tmp_path / "run/pipeline/model_index.json").is_file()


PREVIEWS = (*FLAGS, "--preview_epochs", "1", "--signal_rank", "1")


def test_a_stop_of_one_process_in_its_share_of_the_previews_saves_them_all(tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    processes = start_ranks(TOY, ["--output_dir", str(run), *PREVIEWS, "--signal_at", "previews"])
    statuses, errors = outcomes(processes)
    assert statuses == [REQUEUE_STATUS, REQUEUE_STATUS], errors
    assert "Traceback" not in errors
    assert "everything is saved" in (run / "run.log").read_text(encoding="utf-8")
    assert json.loads((run / "checkpoints/latest/trainer_state.json").read_text())["pending_events"]
    toy(run, *PREVIEWS[4:], processes=2)
    toy(whole, *PREVIEWS[4:], processes=2)
    assert_same_state(run, whole)


def test_an_error_in_the_share_of_one_process_of_the_previews_ends_both_with_one_message(tmp_path):
    processes = start_ranks(TOY, ["--output_dir", str(tmp_path / "run"), *PREVIEWS, "--broken_previews", "true"])
    assert_both_end_with(processes, "an image of the previews is truncated")


def test_a_process_that_is_killed_in_its_share_of_the_previews_ends_the_other(tmp_path):
    run = tmp_path / "run"
    processes = start_ranks(TOY, ["--output_dir", str(run), *PREVIEWS, "--long_part", "previews"])
    wait_for(lambda: "long part: previews" in processes[1].stdout, processes)
    processes[1].kill()
    statuses, errors = outcomes(processes)
    assert statuses == [2, -signal.SIGKILL]
    assert "another process of this run ended without a message" in errors
    assert "Traceback" not in errors


def test_a_signal_to_one_process_before_the_first_step_ends_both(tmp_path):
    """The first step, which takes long, is left at once, and the same command does it again."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    processes = start_ranks(TOY, ["--output_dir", str(run), *FLAGS, "--slow_seconds", "5"])
    log = run / "run.log"
    wait_for(lambda: log.exists() and "starting from scratch" in log.read_text(encoding="utf-8"), processes)
    processes[1].send_signal(signal.SIGTERM)
    asked = time.monotonic()
    statuses, errors = outcomes(processes)
    assert time.monotonic() - asked < 5
    assert statuses == [REQUEUE_STATUS, REQUEUE_STATUS], errors
    assert "Traceback" not in errors
    toy(run, *FLAGS[4:], processes=2)
    toy(whole, *FLAGS[4:], processes=2)
    assert_same_state(run, whole)


def test_torchrun_reports_no_traceback_of_gloo(tmp_path):
    done = subprocess.run(
        command(TOY, "--output_dir", str(tmp_path / "run"), *FLAGS, "--broken_row", "5", processes=2),
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1  # the status of torchrun itself
    assert done.stderr.count("row 5: the image is truncated") == 1
    assert "gloo" not in done.stderr
    assert "exitcode  : 2" in done.stderr


def test_two_runs_one_after_another_in_the_same_processes(tmp_path):
    """Each `train` watches in a part of the store of its own, as the launcher may keep the store for all of them."""
    script = tmp_path / "twice.py"
    script.write_text(
        "import sys\n"
        "from tests.support.toy import main\n"
        "for name in ('a', 'b'):\n"
        "    assert main(['--output_dir', sys.argv[1] + name, *sys.argv[2:]]) == 0\n"
    )
    flags = (str(tmp_path) + "/", *FLAGS[:6], "--max_train_steps", "2")
    launcher = command(script, *flags, processes=2)
    done = subprocess.run(
        launcher, env=environment(PYTHONPATH=str(ROOT)), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
