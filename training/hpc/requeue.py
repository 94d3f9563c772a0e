"""Decide whether a job is submitted again; the exit status is 75 if it is, and otherwise that of its command.

    python training/hpc/requeue.py --status 1 --run runs/quickstart/latent_diffusion --before step-00000100 --job 12_1

Job scripts call it when their command has ended. The status alone does not decide: a launcher may turn every end into
status 1, and a node that fails gives none. What counts is the run folder. A run that is complete, or whose command was
wrong (status 2), is not requeued. One that was asked to stop is requeued, and so is one that failed after it had saved
a new checkpoint: a fault of the machine may not happen again, and a run that fails again at the same step ends there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.tools.checkpoint_links import STATE_FILE, steps_in
from pipelines.tools.cli import INTERRUPTED_STATUS, REQUEUE_STATUS, USER_ERROR_STATUS, Options, entry_point
from training.core.files import read_json_object, write_json
from training.run.folder import RunFolder

MOST_WITHOUT_PROGRESS = 10
GIVEN_UP_STATUS = 1
_NEVER = (0, USER_ERROR_STATUS, INTERRUPTED_STATUS)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    folder = RunFolder(options.run) if options.run else None
    newest = newest_checkpoint(folder)
    advanced = newest not in ("", options.before)
    again, reason = decide(options.status, folder, advanced)
    counter = Path(options.log_dir, f"{options.job}.requeued.json")
    count = 0 if advanced else int((read_json_object(counter) or {}).get("without_progress", 0))
    if again and count >= MOST_WITHOUT_PROGRESS:
        again, reason = False, f"it was requeued {count} times without a new checkpoint; give it more --time"
    if again:
        counter.parent.mkdir(parents=True, exist_ok=True)
        write_json(counter, {"without_progress": count + (not advanced), "checkpoint": newest})
    if options.status != 0:
        print(f"exit status {options.status}: {reason}", file=sys.stderr)
    if again:
        return REQUEUE_STATUS
    return GIVEN_UP_STATUS if options.status == REQUEUE_STATUS else options.status


def decide(status: int, folder: RunFolder | None, advanced: bool) -> tuple[bool, str]:
    """Return whether a job is requeued, and why.

    Args:
        folder: the run folder of a training; None for other commands.
        advanced: whether the run has a newer checkpoint than when the job started.
    """
    if status in _NEVER:
        return False, "the job is not requeued"
    if folder is not None and is_complete(folder):
        return False, "the run is complete"
    if status == REQUEUE_STATUS:
        return True, "the job was asked to stop and is requeued"
    if advanced:
        return True, "the run has a new checkpoint and is not complete; the job is requeued"
    return False, "the command failed without progress; see the error above"


def is_complete(folder: RunFolder) -> bool:
    """Return whether the run has done all steps, or stopped early, and its pipeline is exported."""
    checkpoints = steps_in(folder.checkpoints)
    state = (read_json_object(checkpoints[0] / STATE_FILE) or {}) if checkpoints else {}
    step, goal = state.get("step"), state.get("goal_steps")
    if not isinstance(step, int) or not isinstance(goal, int) or not folder.is_exported(step):
        return False
    return (step >= goal or bool(state.get("stopped_early"))) and not state.get("pending_events")


def newest_checkpoint(folder: RunFolder | None) -> str:
    """Return the name of the newest checkpoint, or an empty string."""
    found = steps_in(folder.checkpoints) if folder is not None else []
    return found[0].name if found else ""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options. Raises UserError."""
    parser = Options(__doc__)
    add = parser.add_argument
    add("--status", type=int, required=True, help="Exit status of the command")
    add("--run", default="", help="Run folder of a training; empty for other commands")
    add("--before", default="", help="Name of the newest checkpoint when the job started; empty if there was none")
    add("--job", required=True, help="Id of the job, and number of its task: 12_1")
    add("--log_dir", default="runs/hpc", help="Folder for the number of times that the job was requeued")
    return parser.parse(argv)


if __name__ == "__main__":
    entry_point(main)
