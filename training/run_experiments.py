"""Run a series of experiments one after another, and compare them: a table, and a row of samples from each.

    python training/run_experiments.py configs/experiments/latent_diffusion/ablation/capacity_*.yaml
    python training/run_experiments.py configs/experiments/latent_diffusion/ablation/*.yaml --print_commands
    python training/run_experiments.py configs/experiments/latent_diffusion/ablation/*.yaml -- --max_train_steps 20
    python training/run_experiments.py autoencoder/emoji_64 --sweep learning_rate=1e-4,5e-4 --seeds 3 --dry_run

Each experiment runs in a process of its own, as if a user had started it. With --sweep, each file becomes one run for
each combination of values; with --seeds, for each random seed as well. The arguments after -- are passed to all of
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
from training.core.scripts import script_path
from training.engine.prepare import run_script
from training.engine.run_config import RunConfig
from training.engine.signals import Interrupted, StopSignal
from training.experiments.comparison import Samples, Table, comparison_table, draw_samples, write_comparison
from training.experiments.registry import config_class, stage_of
from training.experiments.seeds import seeds_csv, seeds_markdown, seeds_table
from training.experiments.sweeps import Sweep, Variant, parse_sweeps, variants
from training.publishing.hub import UPLOAD_FAILED_STATUS, Publisher
from training.reporting.tracking import WANDB_LIMITS, parse_report_to
from training.run.folder import RunFolder


@dataclass
class Experiment:
    """One config file, parsed as its training script would parse it together with the flags of the series."""

    name: str
    file: str
    stage: str
    config: RunConfig
    flags: list[str]
    setting: str = ""
    """Name of what the runs with other seeds share; empty without --seeds"""

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
    experiments = plan(options.configs, options.flags, parse_sweeps(options.sweep), options.seeds)
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
        seeds = _over_seeds(experiments, table)
        written = write_comparison(folder, table, None, seeds)
        with contextlib.suppress(Interrupted):
            stop.check()
            image = draw_samples(runs, Samples(options.prompt, options.num_samples, options.seed), stop.check)
            written = write_comparison(folder, table, image, seeds)
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
    add(
        "--sweep", action="append", default=[], metavar="OPTION=VALUE,VALUE",
        help="Values of an option, of which each becomes a run; several --sweep run all combinations",
    )  # fmt: skip
    add("--seeds", type=int, metavar="N", help="Train each with N random seeds: that of the config and the next ones")
    add("--print_commands", "--dry_run", action="store_true", help="Print the commands without running them")
    add("--output_dir", help="Folder for comparison.csv, .md and .png (default: nearest folder with all run folders)")
    add("--prompt", nargs="+", help="Prompts of the samples (default: preview prompts of the first run that has any)")
    add("--num_samples", type=int, default=6, help="Number of samples in each row of comparison.png (default: 6)")
    add("--seed", type=int, default=0, help="Random seed; column k (from 0) uses seed + k (default: 0)")
    options = parser.parse(words[:cut])
    options.flags = words[cut + 1 :]
    if options.num_samples < 1:
        raise UserError(f"--num_samples is {options.num_samples}; it must be at least 1")
    if options.seeds is not None and options.seeds < 1:
        raise UserError(f"--seeds is {options.seeds}; it must be at least 1")
    return options


def plan(
    configs: Sequence[str], flags: Sequence[str], sweeps: Sequence[Sweep] = (), seeds: int | None = None
) -> list[Experiment]:
    """Return the experiments of these files; all of them are checked before the first one starts.

    Args:
        flags: flags of all experiments.
        sweeps: options whose values are combined; each combination is an experiment.
        seeds: number of seeds of each experiment; None keeps the seed of the file.

    Raises:
        UserError: if a file does not exist or is invalid, or if two experiments write to the same run folder.
    """
    experiments: list[Experiment] = []
    combined = variants(sweeps, seeds)
    for file in _expanded(configs):
        try:
            stage = stage_of(file)
            if sweeps or seeds is not None:
                experiments += [_variant_of(file, stage, flags, variant) for variant in combined]
            else:
                config = parse_config(config_class(stage), ["--config", file, *flags])
                experiments.append(Experiment(Path(file).stem, file, stage, config, list(flags)))
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
    folders: dict[Path, Experiment] = {}
    for experiment in experiments:
        path = experiment.folder.path.resolve()
        if path in folders:
            one, other = folders[path], experiment
            both = (one.file, other.file) if one.file != other.file else (one.name, other.name)
            raise UserError(
                f"{both[0]} and {both[1]} have the same output_dir {experiment.config.output_dir}; "
                "give each experiment its own output_dir"
            )
        folders[path] = experiment
    if len({experiment.name for experiment in experiments}) < len(experiments):
        for experiment in experiments:
            experiment.name = f"{Path(experiment.file).parent.name}/{experiment.name}"
            experiment.setting = experiment.setting and f"{Path(experiment.file).parent.name}/{experiment.setting}"
    _set_groups(experiments)
    return experiments


def _variant_of(file: str, stage: str, flags: Sequence[str], variant: Variant) -> Experiment:
    """Return the experiment of a file with the values and the seed of a variant, in a run folder of its own."""
    words = [*flags, *variant.flags]
    config = parse_config(config_class(stage), ["--config", file, *words])
    seed = config.seed + (variant.repetition or 0)
    own = [f"--seed={seed}"] if variant.repetition is not None else []
    folder = Path(f"{config.output_dir}_sweep", variant.folder(seed))
    words += [*own, f"--output_dir={folder}"]
    name = f"{Path(file).stem} {variant.setting}".strip()
    return Experiment(
        f"{name}, seed {seed}" if own else name,
        file,
        stage,
        parse_config(config_class(stage), ["--config", file, *words]),
        words,
        name if own else "",
    )


def _set_groups(experiments: Sequence[Experiment]) -> None:
    """Let W&B show the runs of one setting, or else of the series, as a group, unless the user names one."""
    for experiment in experiments:
        config = experiment.config
        if config.wandb_group is None and "wandb" in parse_report_to(config.report_to):
            group = experiment.setting or common_folder(experiments).resolve().name or "experiments"
            config.wandb_group = group[: WANDB_LIMITS["wandb_group"]]
            experiment.flags = [*experiment.flags, f"--wandb_group={config.wandb_group}"]


def _over_seeds(experiments: Sequence[Experiment], table: Table) -> tuple[str, str] | None:
    """Return the metrics over the seeds of each setting as Markdown and as CSV; None without --seeds."""
    settings = {experiment.name: experiment.setting for experiment in experiments if experiment.setting}
    if not settings:
        return None
    summary = seeds_table(table, settings)
    return seeds_markdown(summary), seeds_csv(summary)


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
