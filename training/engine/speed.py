"""Measures how fast this machine trains, by timing some of a run's own steps before the run begins.

`--max_train_minutes` uses it to fit the number of steps to a time. Everything that a step changes is restored
afterwards from a temporary checkpoint, so a run that was timed first gives the same weights as one that was not.
"""

from __future__ import annotations

import functools
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.core.files import WRITING, read_json_object, write_json
from training.core.stage import Batch
from training.engine.best import best_metric
from training.engine.cadence import Cadence
from training.engine.launch import exchange_of, gather, on_main
from training.engine.restoring import check_disk
from training.engine.run_config import RunConfig
from training.engine.saving import holds_best
from training.engine.signals import Interrupted, StopSignal
from training.engine.step_values import Requests, read
from training.engine.threads import main_thread_on_its_core
from training.engine.training import Training
from training.engine.validation import interrupted_together, validate
from training.run.folder import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("halftone")

SPEED_FILE = "speed.json"
# The first steps allocate memory and choose kernels; they are not typical of the rest.
WARM_UP_STEPS = 3
TIMED_SECONDS, MIN_TIMED_STEPS, MAX_TIMED_STEPS = 4.0, 3, 400
VALIDATION_BATCHES = 2
# A shorter run gives no useful model, even if --max_train_minutes asks for one.
MIN_STEPS = 50


@dataclass
class Speed:
    """Seconds that each part of a run takes on this machine, as measured by `measure_speed`."""

    startup: float
    """Time from the start of the session to its first step, this measurement included."""
    phases: dict[str, float]
    """Seconds of one step of each phase, by name; those of the first phase include loading the batch and the EMA."""
    validation: float
    """One validation of the whole validation set."""
    previews: float
    """One set of previews."""
    checkpoint: float
    """One checkpoint, its pipeline included."""
    evaluation: float = 0.0
    """One measurement of generated images (`--evaluation_epochs`). Absent in the files of earlier versions."""
    copies: float = 0.0
    """One search for copies alone (`--memorization_epochs`). Absent in the files of earlier versions."""

    def seconds(self, steps: int, training: Training, config: RunConfig) -> float:
        """Return the estimated seconds of a run of `steps` steps, from its start to the final pipeline."""
        cadence = Cadence(config, training.steps_per_epoch, steps)
        total = self.startup + self.checkpoint  # the export at the end costs about as much as a checkpoint
        for runner in training.runners:
            total += self.phases[runner.phase.name] * max(0, steps - runner.phase.first_step(steps))
        validations = cadence.validation_steps() | {steps}
        total += self.validation * len(validations) + self.previews * len(cadence.preview_steps() | {steps})
        evaluations = cadence.evaluation_steps()
        total += self.evaluation * len(evaluations) + self.copies * len(cadence.copies_steps())
        # A measurement that is the best so far needs a checkpoint as well; early in a run most of them are the best.
        by_images = best_metric(training.stage, config, cadence).name.startswith("eval_")
        deciding = evaluations if by_images else validations
        due = cadence.checkpoint_steps() | {steps}
        by_time = total // (60 * config.checkpointing_minutes) if config.checkpointing_minutes else 0
        if holds_best(training, cadence):  # it is written before each of the others, or in the place of one by time
            by_steps = len(due) + min(len(due), len(deciding - due))
        else:
            by_steps = len(due | deciding)
        return total + self.checkpoint * max(by_steps, by_time)

    def steps_in(self, seconds: float, most: int, training: Training, config: RunConfig) -> int:
        """Return the largest number of steps, from MIN_STEPS to `most`, with which a run takes at most `seconds`."""
        low, high = min(MIN_STEPS, most), most
        while low < high:
            middle = (low + high + 1) // 2
            if self.seconds(middle, training, config) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low


def fit_length(
    training: Training, config: RunConfig, folder: RunFolder, accelerator: Accelerator, stop: StopSignal, started: float
) -> None:
    """Set the goal of a run so that it takes `--max_train_minutes` on this machine, and say what to expect.

    The speed is measured once for each run, before its first step, and kept in its folder, so that a resumed session
    computes the same goal from it.

    Args:
        started: `time.perf_counter()` at the start of the session.

    Raises:
        Interrupted: on every process, when any of them was asked to stop.
    """
    state, file = training.state, folder.path / SPEED_FILE
    saved = on_main(accelerator, lambda: _saved_speed(file, training))
    speed = Speed(**saved) if saved else measure_speed(training, config, folder, accelerator, stop, started)
    full = state.goal_steps
    state.goal_steps = max(state.step, speed.steps_in(60 * config.max_train_minutes, full, training, config))
    plan = {
        "max_train_minutes": config.max_train_minutes,
        "steps": state.goal_steps,
        "estimated_seconds": round(speed.seconds(state.goal_steps, training, config), 1),
        "all_steps": full,
        "all_steps_estimated_seconds": round(speed.seconds(full, training, config), 1),
        "seconds": asdict(speed),
    }
    if accelerator.is_main_process:
        write_json(file, plan)
        if state.step < state.goal_steps:
            _say_what_to_expect(plan, config)


def _saved_speed(file: Path, training: Training) -> dict[str, Any] | None:
    """Return the seconds in speed.json; None if it does not exist, is damaged, or is of another run."""
    if not file.is_file():
        return None
    saved = (read_json_object(file) or {}).get("seconds")
    names = {runner.phase.name for runner in training.runners}
    known = {field.name for field in fields(Speed)}
    needed = {field.name for field in fields(Speed) if field.default is MISSING}
    if isinstance(saved, dict) and needed <= saved.keys() <= known:
        phases = saved["phases"]
        numbers = [value for name, value in saved.items() if name != "phases"]
        of_this_run = isinstance(phases, dict) and phases.keys() == names
        if of_this_run and all(isinstance(number, (int, float)) for number in (*numbers, *phases.values())):
            return saved
    logger.warning("%s is damaged, so the speed is measured again", file)
    return None


def measure_speed(
    training: Training, config: RunConfig, folder: RunFolder, accelerator: Accelerator, stop: StopSignal, started: float
) -> Speed:
    """Time the parts of a run, and restore models, optimizers, EMA weights and counts afterwards."""
    kept = folder.checkpoints / f"{WRITING}speed"
    check_room = functools.partial(check_disk, folder, training.checkpoint_bytes(), config.checkpoints_total_limit)
    on_main(accelerator, check_room)
    with training.gathered():
        checkpoint = on_main(accelerator, lambda: _seconds(lambda: _write_new(training, kept)))
    try:
        with interrupted_together(accelerator), main_thread_on_its_core(training.device):
            phases = _time_steps(training, accelerator, stop)
            with training.evaluating():
                validation = _time_validation(training, config, accelerator, stop)
                evaluation, copies = _time_evaluations(training, config, accelerator)
                previews = _seconds(lambda: training.stage.previews(exchange_of(accelerator)))
    finally:
        for part in training.checkpoint_parts:
            part.load(kept)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(kept, ignore_errors=True)
    speed = Speed(time.perf_counter() - started, phases, validation, previews, checkpoint, evaluation, copies)
    return Speed(**gather(accelerator, asdict(speed))[0])  # the main process decides for all


def _write_new(training: Training, folder: Path) -> None:
    """Write a checkpoint's files into a new folder, which replaces one that a killed process left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    training.write_files(folder)


def _time_steps(training: Training, accelerator: Accelerator, stop: StopSignal) -> dict[str, float]:
    """Return the mean seconds of a step of each phase, including phases that begin later in the run."""
    for runner in training.runners:
        runner.settle_buckets(*training.batches.first())
    steps = training.batches.steps(0, WARM_UP_STEPS + MAX_TIMED_STEPS)
    for step in range(WARM_UP_STEPS):
        last = _one_step(training, step, next(steps), stop)
    wished = round(TIMED_SECONDS / max(sum(last.values()), 1e-6))
    # All processes take the same number of steps, since each step is an exchange between them.
    count = gather(accelerator, max(MIN_TIMED_STEPS, min(MAX_TIMED_STEPS, wished)))[0]
    total = dict.fromkeys(last, 0.0)
    started = time.perf_counter()
    for step in range(WARM_UP_STEPS, WARM_UP_STEPS + count):
        for name, seconds in _one_step(training, step, next(steps), stop).items():
            total[name] += seconds
    # Loading the batches and updating the EMA weights belong to every step: they go to the first phase.
    total[next(iter(total))] += time.perf_counter() - started - sum(total.values())
    return {name: seconds / count for name, seconds in total.items()}


def _one_step(training: Training, step: int, batches: list[Batch], stop: StopSignal) -> dict[str, float]:
    """Take one step of every phase, and return the seconds of each."""
    seconds, stop_agreed = {}, False
    for runner in training.runners:
        started = time.perf_counter()
        outcome = runner.step(step, batches, runner.learning_rate, Requests(stop=stop.requested is not None))
        (result,) = read([outcome])  # so that the time includes the device's
        seconds[runner.phase.name] = time.perf_counter() - started
        stop_agreed |= result.requests.stop
    if training.ema is not None:
        training.ema.update(step + 1)
    if stop_agreed:
        raise Interrupted
    return seconds


def _time_validation(training: Training, config: RunConfig, accelerator: Accelerator, stop: StopSignal) -> float:
    """Return the estimated seconds of a whole validation, from a few of its batches."""
    data = training.stage.validation_data()
    if data is None:
        return 0.0
    batch_size = config.validation_batch_size or training.layout.train_batch_size
    batches = math.ceil(len(data) / (batch_size * accelerator.num_processes))
    few = min(VALIDATION_BATCHES, batches)

    def first_batches(count: int) -> None:
        validate(
            training.stage, accelerator, seed=config.seed, batch_size=batch_size, poll=stop.check, max_batches=count
        )

    first_batches(1)
    return _seconds(lambda: first_batches(few)) * batches / few


def _time_evaluations(training: Training, config: RunConfig, accelerator: Accelerator) -> tuple[float, float]:
    """Return the estimated seconds of measuring generated images, and of a search for copies alone."""
    exchange, stage = exchange_of(accelerator), training.stage
    evaluates = Cadence(config, training.steps_per_epoch, training.state.goal_steps).evaluates
    return (
        stage.evaluation_seconds(exchange, distances=True, copies=True) if evaluates else 0.0,
        stage.evaluation_seconds(exchange, distances=False, copies=True) if config.memorization_epochs else 0.0,
    )


def _seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _say_what_to_expect(plan: Mapping[str, Any], config: RunConfig) -> None:
    logger.info(
        "a step takes %.3g seconds on this machine; all %d steps would take about %s",
        sum(plan["seconds"]["phases"].values()),
        plan["all_steps"],
        _duration(plan["all_steps_estimated_seconds"]),
    )
    if plan["steps"] < plan["all_steps"]:
        limit, further = config.time_limit()
        duration = _duration(plan["estimated_seconds"])
        logger.info("%s, so the run trains %d steps, in about %s. %s", limit, plan["steps"], duration, further)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
