"""Run a series of experiments one after another, and compare them: a table, and a row of samples from each.

    python training/run_experiments.py configs/experiments/latent_diffusion/ablation/capacity_*.yaml
    python training/run_experiments.py configs/experiments/latent_diffusion/ablation/*.yaml --print_commands
    python training/run_experiments.py configs/experiments/latent_diffusion/ablation/*.yaml -- --max_train_steps 20

Each experiment runs in a process of its own, as if a user had started it. The arguments after -- are passed to all of
them. Finished experiments are skipped and interrupted ones are resumed; if one fails, the others still run. Run the
same command again to complete a series. The exit status is 1 if an experiment or its upload failed; if the series was
stopped by a signal, it is the status of that signal (see docs/runs.md).
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.tools.checkpoint_links import STATE_FILE, follow_links
from pipelines.tools.cli import Options, UserError, entry_point
from pipelines.tools.credentials import mask_credentials
from pipelines.tools.resources import find_file, shipped_path
from training.core.files import read_json_object
from training.core.parsing import parse_config
from training.engine.prepare import run_script
from training.engine.run_config import RunConfig
from training.engine.signals import Interrupted, StopSignal
from training.experiments.comparison import Samples, comparison_table, draw_samples, write_comparison
from training.experiments.registry import config_class, script_path, stage_of
from training.publishing.hub import UPLOAD_FAILED_STATUS, Publisher
from training.run.folder import RunFolder


@dataclass
class Experiment:
    """One config file, parsed as its training script would parse it together with the flags of the series."""

    name: str
    file: str
    stage: str
    config: RunConfig
    flags: list[str]

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.config.output_dir)

    @property
    def words(self) -> list[str]:
        """The command line of the experiment: script and flags, without the interpreter."""
        script = script_path(self.stage)
        shown = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
        return [str(shown), "--config", self.file, *self.flags]


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    experiments = plan(options.configs, options.flags)
    if options.print_commands:
        for experiment in experiments:
            done = "  # finished" if is_finished(experiment) else ""
            print(f"python {mask_credentials(shlex.join(experiment.words))}{done}")
        return 0
    folder = Path(options.output_dir) if options.output_dir else common_folder(experiments)
    with StopSignal() as stop:
        outcomes = run_series(experiments, stop)
        runs = {experiment.name: (experiment.stage, experiment.folder, experiment.config) for experiment in experiments}
        table = comparison_table(runs, outcomes)
        written = write_comparison(folder, table, None)
        with contextlib.suppress(Interrupted):
            stop.check()
            image = draw_samples(runs, Samples(options.prompt, options.num_samples, options.seed), stop.check)
            written = write_comparison(folder, table, image)
        print("\n".join(["", *(f"{name}: {outcome}" for name, outcome in outcomes.items()), *map(str, written)]))
        if stop.requested is not None:
            print("the series was stopped; run the same command again to resume it")
            return stop.exit_status(stop.requested)
    return int(any(outcome.startswith("failed") or "not uploaded" in outcome for outcome in outcomes.values()))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options; the arguments after `--` become `flags`. Raises UserError."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = Options(__doc__)
    add = parser.add_argument
    add("configs", nargs="+", help="YAML config files of any training script; patterns with * are expanded")
    add("--print_commands", "--dry_run", action="store_true", help="Print the commands without running them")
    add("--output_dir", help="Folder for comparison.csv, .md and .png (default: nearest folder with all run folders)")
    add("--prompt", nargs="+", help="Prompts of the samples (default: preview prompts of the first run that has any)")
    add("--num_samples", type=int, default=6, help="Number of samples in each row of comparison.png (default: 6)")
    add("--seed", type=int, default=0, help="Random seed; column k (from 0) uses seed + k (default: 0)")
    options = parser.parse(words[:cut])
    options.flags = words[cut + 1 :]
    if options.num_samples < 1:
        raise UserError(f"--num_samples is {options.num_samples}; it must be at least 1")
    return options


def plan(configs: Sequence[str], flags: Sequence[str]) -> list[Experiment]:
    """Return the experiments of these files; all of them are checked before the first one starts.

    Raises:
        UserError: if a file does not exist or is invalid, or if two files write to the same run folder.
    """
    experiments: list[Experiment] = []
    for file in _expanded(configs):
        try:
            stage = stage_of(file)
            config = parse_config(config_class(stage), ["--config", file, *flags])
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        experiments.append(Experiment(Path(file).stem, file, stage, config, list(flags)))
    folders: dict[Path, str] = {}
    for experiment in experiments:
        path = experiment.folder.path.resolve()
        if path in folders:
            raise UserError(
                f"{folders[path]} and {experiment.file} have the same output_dir {experiment.config.output_dir}; "
                "give each experiment its own output_dir"
            )
        folders[path] = experiment.file
    if len({experiment.name for experiment in experiments}) < len(experiments):
        for experiment in experiments:
            experiment.name = f"{Path(experiment.file).parent.name}/{experiment.name}"
    return experiments


def run_series(experiments: Sequence[Experiment], stop: StopSignal) -> dict[str, str]:
    """Run the experiments that are not finished and return, by name, a few words on how each one ended.

    After a request to stop, the remaining experiments are not started.
    """
    outcomes: dict[str, str] = {}
    for number, experiment in enumerate(experiments, 1):
        if stop.requested is not None:
            outcomes[experiment.name] = "not begun" if not experiment.folder.saved_config() else "unfinished"
            continue
        title = f"[{number}/{len(experiments)}] {experiment.name}"
        if is_finished(experiment):
            outcomes[experiment.name] = "finished" + _changed_since(experiment)
            print(f"{title}: already {outcomes[experiment.name]}, see {experiment.folder.path}", flush=True)
            continue
        print(f"{title}\n      python {mask_credentials(shlex.join(experiment.words))}", flush=True)
        status = run_script([sys.executable, *experiment.words], lambda: stop.requested)
        outcomes[experiment.name] = _outcome(status, stop.requested is not None)
        print(f"{title}: {outcomes[experiment.name]}", flush=True)
    return outcomes


def is_finished(experiment: Experiment) -> bool:
    """Return whether the run has done all requested steps, or stopped early, and its pipeline is exported (and on the
    Hub, if requested)."""
    folder, config = experiment.folder, experiment.config
    if config.overwrite or config.extra_epochs or not folder.record_file.is_file():
        return False
    if config.push_to_hub and Publisher(config, folder=folder).is_behind():
        return False
    saved = folder.saved_config()
    if saved is None or config.changes_from(saved)["error"]:
        return False  # started again, its script reports the settings that cannot change
    state = read_json_object(follow_links(folder.checkpoints / "latest") / STATE_FILE) or {}
    match read_json_object(folder.record_file):
        case {"steps": int(steps), "num_train_images": int(images), "global_batch_size": int(batch)} if batch > 0:
            target_steps = config.max_train_steps or config.num_train_epochs * (images // batch)
        case _:
            return False  # damaged; the script makes it again
    if not (folder.pipeline / "model_index.json").is_file() or state.get("step", steps) != steps:
        return False
    return steps >= target_steps or state.get("stopped_early", False)


def common_folder(experiments: Sequence[Experiment]) -> Path:
    """Return the nearest folder that contains all run folders."""
    common = Path(os.path.commonpath([experiment.folder.path.resolve().parent for experiment in experiments]))
    return common.relative_to(Path.cwd()) if common.is_relative_to(Path.cwd()) else common


def _expanded(patterns: Sequence[str]) -> list[str]:
    """Return the files in the given order.

    A pattern that the shell did not expand stands for the user's own files that match it, sorted, or else for the
    matching files that come with Halftone.
    """
    files = []
    for pattern in patterns:
        own = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))
        shipped = sorted(glob.glob(pattern, root_dir=shipped_path("")))
        files += own or [str(shipped_path(file)) for file in shipped] or [str(find_file(pattern))]
    return list(dict.fromkeys(files))


def _changed_since(experiment: Experiment) -> str:
    """Return a note on the settings that differ from those of the finished run; empty where none do."""
    saved: dict[str, Any] = experiment.folder.saved_config() or {}
    changes = experiment.config.changes_from(saved)["warn"]
    if not changes:
        return ""
    return f" with other settings ({'; '.join(changes)}; add -- --overwrite true to run all experiments again)"


def _outcome(status: int, stopped: bool) -> str:
    if status == 0:
        return "finished"
    if status == UPLOAD_FAILED_STATUS:
        return "finished, but not uploaded"
    return "unfinished" if stopped else f"failed with exit status {status}"


if __name__ == "__main__":
    entry_point(main)
