"""Adds what training/evaluate.py measured to the record of a run in its trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.tools.cli import UserError, cause
from training.reporting.backends import Notify, numbers
from training.reporting.groups import QUALITY
from training.reporting.tracking import parse_report_to, start_trackers, wandb_options
from training.run.checkpoint import newest
from training.run.folder import RunFolder
from training.run.state import RunState


def report_evaluation(
    run: Path, results: Mapping[str, Any], report_to: str | Sequence[str] | None = None, notify: Notify = print
) -> None:
    """Write the metrics of an evaluation into the summary of a run in its trackers, which continue their record.

    Whatever fails, such as a tracker that cannot be reached, costs a warning.

    Args:
        run: the run folder.
        results: the content of evaluation.json.
        report_to: trackers, as in `--report_to`; None for those that recorded the run.
    """
    try:
        _report(run, results, report_to, notify)
    except Exception as error:  # trackers only inform
        reason = str(error) if isinstance(error, UserError) else cause(error)
        notify(f"warning: the trackers of {run} do not get the metrics of this evaluation: {reason}")


def _report(run: Path, results: Mapping[str, Any], report_to: str | Sequence[str] | None, notify: Notify) -> None:
    settings = RunFolder(run).saved_config() or {}
    names = parse_report_to(settings.get("report_to") if report_to is None else report_to)
    folder = RunFolder(run, settings.get("run_name") or "")
    checkpoint = newest(folder.checkpoints)
    if not names or checkpoint is None:
        return
    state = RunState.read(checkpoint)
    with folder.lock:  # a process that is training there records the same run
        trackers = start_trackers(
            names,
            project=str(settings.get("tracker_project_name") or "halftone"),
            run_name=folder.name,
            run_dir=folder.path,
            config=settings,
            wandb=wandb_options(settings),
            previous_id=state.tracker_id,
            notify=notify,
        )
        trackers.summary(evaluation_summary(results))
        trackers.finish()


def evaluation_summary(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of an evaluation by their names in trackers: metrics, floors, rates of copies, and of what."""
    floors = {f"{name}_floor": value.get("mean") for name, value in results["floor"].items() if isinstance(value, dict)}
    rates = {}
    for report in results.get("copies", []):
        rates[f"copy_rate_{report['space']}"] = report["copy_rate"]
        rates[f"copy_rate_{report['space']}_expected"] = report["false_positive_rate"]
    facts = {f"evaluated_{name}": results.get(key) for name, key in (("images", "num_images"), ("step", "step"))}
    found = numbers({**results["metrics"], **floors, **rates, **facts})
    return {f"{QUALITY}/{name}": value for name, value in found.items()}
