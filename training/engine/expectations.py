"""Warnings at the start of a session about a run that will probably disappoint: too short, or slowed down by events."""

from __future__ import annotations

from collections.abc import Iterator

from training.engine.cadence import Cadence
from training.engine.run_config import RunConfig
from training.engine.schedule import PhaseSchedule
from training.engine.training import Training
from training.reporting.advice import Course

# In fewer steps, models of every stage are still close to their random weights, or to the mean of their data.
FEW_STEPS, ENOUGH_STEPS = 2000, 5000


def course(training: Training, config: RunConfig) -> Course:
    """Return the facts about a restored run for the advice during training."""
    stage, runner = training.stage, training.runners[0]
    goal = training.state.goal_steps
    schedule = PhaseSchedule(runner.phase, config, runner.learning_rate, goal, training.state.most_warmup)
    warm = schedule.first_step + schedule.warmup_steps
    return Course(training.steps_per_epoch, goal, warm, stage.trivial_loss, stage.conditions)


def warnings_at_start(training: Training, config: RunConfig) -> Iterator[str]:
    """Yield sentences about the settings of a session, each with the numbers and what to change.

    Those about the whole run are left out when it is resumed.
    """
    state = training.state
    yield from Cadence(config, training.steps_per_epoch, state.goal_steps).warnings()
    if state.step > 0:
        return
    for runner in training.runners:
        schedule = PhaseSchedule(runner.phase, config, runner.learning_rate, state.goal_steps, state.most_warmup)
        if schedule.warmup_steps < (config.lr_warmup_steps or 0) and config.has_warmup:
            yield (
                f"--lr_warmup_steps {config.lr_warmup_steps} is more than {state.most_warmup:.0%} of the "
                f"{schedule.steps:,} steps of phase '{schedule.name}': its learning rate rises over "
                f"{schedule.warmup_steps} of them; a longer run may have a longer warm-up"
            )
    if state.goal_steps < FEW_STEPS and not (config.starts_trained or config.max_train_minutes):
        epochs = state.goal_steps / training.steps_per_epoch
        yield (
            f"this run has {state.goal_steps:,} steps ({epochs:.3g} epochs of {training.steps_per_epoch:,}); from "
            f"random weights, fewer than about {FEW_STEPS:,} rarely give a useful model. For more, set "
            f"--max_train_steps {ENOUGH_STEPS}"
        )
