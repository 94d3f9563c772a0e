"""A training command whose settings are being chosen for a collection of images."""

from __future__ import annotations

import functools
import os
import shlex
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.tools.cli import UserError
from pipelines.tools.devices import bf16_products_are_faster, get_device
from training.core.made_folders import incomplete
from training.core.options import Options
from training.core.parsing import written
from training.data.source import DataConfig
from training.engine.launch import prepare_cpu
from training.engine.signals import STARTED_BY
from training.recipes import estimate, settings, table
from training.recipes.collection import FEW_IMAGES, Collection, look_at
from training.recipes.folders import collection_folder
from training.recipes.options import budget_seconds
from training.recipes.settings import Time
from training.run.folder import RunFolder

# Options of the data, and of every training, that are passed on to the commands that make the inputs.
DATA = tuple(DataConfig.__dataclass_fields__)
TRACKERS = ("report_to", "tracker_project_name", "wandb_group", "wandb_tags", "wandb_entity")
SHARED = ("seed", *TRACKERS, "cpu_threads", "mixed_precision", "dataloader_num_workers")
# What may change when a run is resumed; all other decisions stay as the run was started with them.
_FREE = ("max_train_steps",)
# What a run that begins with the weights of another one has from it: the networks, and what they were trained with.
_OF_ORIGIN = ("model.", "transformer.", "text_encoder.", "prediction_type")
_LENGTHS = ("num_train_epochs", "extra_epochs", "max_train_steps")
# Starting Python and its libraries takes about this long, before a command can look at a clock.
STARTING_SECONDS = 5.0


def _is_first() -> bool:
    """Return whether this is the main process of the run."""
    return os.environ.get("RANK", "0") == "0"


@dataclass
class Completion:
    """A config that is being completed.

    Attributes:
        given: names of the options that the command line gives.
    """

    config: Any
    given: frozenset[str]
    stage: str

    def __post_init__(self) -> None:
        self._started = time.perf_counter()
        config = self.config
        self.why_denoiser, self.cells = "", 0
        self.settings_without_time: dict[str, Any] = {}
        self.time: Time | None = None
        if "output_dir" in self.given:
            config.dataset_revision = config.kept_revision(self.saved)
        self.collection: Collection = look_at(config, config.seed)
        self._check_output_dir(collection_folder(config.source, write=False))
        self.folder: Path = collection_folder(config.source, write=_is_first() and config.trains)
        if config.image_mode != "rgb":  # what is made of colour images is of no use
            self.folder /= config.image_mode
        self.prepare: dict[str, str] = {}
        self.lines: list[str] = []
        self.trainings: list[estimate.Training] = []

    def _check_output_dir(self, folder: Path) -> None:
        """Raise UserError if a new run would lie in the folder of the collection, among the inputs of all its runs."""
        chosen = Path(os.path.expanduser(self.config.output_dir))
        if "output_dir" not in self.given or os.path.abspath(chosen) != os.path.abspath(folder):
            return
        if not RunFolder(chosen).is_run():
            raise UserError(
                f"--output_dir {self.config.output_dir} is the folder for everything that belongs to these images; "
                f"name a folder in it, such as --output_dir {folder / 'my_run'}, or leave the flag out"
            )

    def decide(self, name: str, value: Any) -> None:
        """Set an option that is not given."""
        if name not in self.given:
            set_option(self.config, name, value)

    def settings(self, stage: str, **situation: Any) -> dict[str, Any]:
        """Return what `settings_for` chooses for a stage on this machine."""
        return settings.settings_for(
            stage,
            self.collection,
            device=get_device().type,
            resolution=self.config.resolution,
            fast_bf16=bool(situation.get("transformer")) and bf16_products_are_faster(),
            num_processes=int(os.environ.get("WORLD_SIZE", "1")),
            **situation,
        )

    def own_settings(
        self, leave_out: str = "", training: Callable[[], estimate.Training] | None = None, **situation: Any
    ) -> None:
        """Set what is not given, and what an earlier session of the run has not decided, for this stage.

        Args:
            leave_out: beginning of the names of options that keep their defaults.
            training: describes the training of this stage, so that its steps can be timed for a time budget.
        """
        self.cells = situation.get("cells", 0)
        chosen = self.settings_without_time = self._apply(self.settings(self.stage, **situation), leave_out)
        if training is not None and self._is_planned:
            self.time = self._time(training())
            chosen = self._apply(self.settings(self.stage, time=self.time, **situation), leave_out)
        usual = chosen["max_train_steps"]
        if "max_train_steps" in self.given and 0 < self.config.max_train_steps < usual:
            self.lines.append(
                f"--max_train_steps {self.config.max_train_steps} limits every training of this command; without it, "
                f"the last one would have {usual:,} steps"
            )
        self._lower_batch()
        if training is not None:
            self.trainings.append(training())

    def _apply(self, chosen: dict[str, Any], leave_out: str) -> dict[str, Any]:
        """Set what is not given to what was chosen, or to what the run was started with; return what was chosen."""
        if leave_out:
            chosen = {name: value for name, value in chosen.items() if not name.startswith(leave_out)}
        saved = self.saved
        free = () if saved.get("time_budget") else _FREE  # with a budget, the length was measured
        for name, value in settings.kept(chosen, self.given).items():
            if saved and name not in free:
                # An option that did not exist when the run began keeps its default.
                self.decide(name, get_saved(saved, name, get_option(self.config, name)))
            elif self.origin and name.startswith(_OF_ORIGIN):  # the initial weights need their own network
                self.decide(name, get_saved(self.origin, name, get_option(self.config, name)))
            else:
                self.decide(name, value)
        return chosen

    def decide_output_dir(self, path: str) -> None:
        """Choose the output folder, and with it the time limit and the commit of the data, which a run in that folder
        keeps."""
        self.decide("output_dir", path)
        config, saved = self.config, self.saved
        revision = config.kept_revision(saved)
        if revision != config.dataset_revision:
            config.dataset_revision = revision
            self.collection = look_at(config, config.seed)
        begun_with = saved.get("time_budget")
        if not begun_with:
            if seconds := budget_seconds(config.time_budget):
                config.max_train_minutes = min(filter(None, (config.max_train_minutes, round(seconds / 60, 2))))
            return
        if config.time_budget not in (None, begun_with):
            self.lines.append(
                f"--time_budget {config.time_budget}: the run was begun with {begun_with}, which it keeps; "
                "--extra_epochs N trains it for longer"
            )
        own_length = any(n in self.given and getattr(config, n) != saved.get(n, 0) for n in _LENGTHS)
        kept = 0.0 if own_length else saved.get("max_train_minutes", 0.0)
        if "max_train_minutes" not in self.given:
            config.max_train_minutes = kept
        elif config.time_budget and kept:
            config.max_train_minutes = min(filter(None, (config.max_train_minutes, kept)))
        config.time_budget = begun_with

    @property
    def _is_planned(self) -> bool:
        """Whether the length of a new run is to be found from its time budget."""
        config = self.config
        new = bool(config.time_budget) and not self.saved and not config.validate_only
        return new and not {*_LENGTHS} & self.given

    def _time(self, training: estimate.Training) -> Time:
        """Return the time of the last training, and time some of its steps; several processes do not."""
        seconds = 60 * self.config.max_train_minutes
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return Time(seconds)
        if get_device().type == "cpu":
            prepare_cpu(self.config)
        seconds = max(1.0, seconds - sum(other.seconds for other in self.trainings))
        return Time(seconds, training.step_seconds / training.batch)

    @property
    def saved(self) -> dict[str, Any]:
        """The config that the run in the output folder was started with; empty for a new run."""
        return {} if self.config.overwrite else RunFolder(self.config.output_dir).saved_config() or {}

    @functools.cached_property
    def origin(self) -> dict[str, Any]:
        """The config of the run that `--init_from` names; empty without one."""
        return (RunFolder(self.config.init_from).saved_config() or {}) if self.config.init_from else {}

    @property
    def steps(self) -> int:
        """The number of steps of the run, on one process."""
        batch = self.config.train_batch_size * self.config.gradient_accumulation_steps
        return self.config.total_steps(max(1, self.collection.images // batch))

    def _lower_batch(self) -> None:
        """Lower a batch size that needs more images than there are."""
        most = max(1, self.collection.images // int(os.environ.get("WORLD_SIZE", "1")))
        if self.config.train_batch_size * self.config.gradient_accumulation_steps > most:
            self.lines.append(
                f"--train_batch_size {self.config.train_batch_size} is lowered to {most}, because there are only "
                f"{self.collection.images} images to train on"
            )
            self.config.train_batch_size, self.config.gradient_accumulation_steps = most, 1

    def needs(self, path: Path, script: str, flags: Mapping[str, Any], pass_on: Iterable[str] = DATA) -> Path:
        """Note that the run needs `path`, which `script` makes; return the folder."""
        passed = {name: getattr(self.config, name) for name in pass_on if name in self.given}
        passed |= {name: value for name, value in self.config.pinned().items() if name in pass_on}
        self.prepare[str(path)] = shlex.join([script, *words({**passed, **flags})])
        return path

    def capped(self, stage: str, **situation: Any) -> dict[str, Any]:
        """Return the flags that limit another training as this one is limited."""
        if "max_train_steps" not in self.given or not self.config.max_train_steps:
            return {}
        steps = self.settings(stage, **situation)["max_train_steps"]
        return {"max_train_steps": min(steps, self.config.max_train_steps)}

    def minutes_for(self, what: str, share: float, *, made: bool) -> dict[str, Any]:
        """Give a share of the time limit, if there is one, to the training of an input; return its flag.

        The last training gets what the others leave, since the limit counts from the start of the command.

        Args:
            made: whether the input exists already.
        """
        minutes = self.config.max_train_minutes
        if not minutes:
            return {}
        other = round(share * minutes, 2)
        if self.saved and "recipe" not in self.saved:  # begun by an earlier version, which divided the time
            self.config.max_train_minutes = round(minutes - other, 2)
        elif not made:
            self.lines.append(
                f"of {minutes:g} minutes, at most {other:g} are for the {what}; the last training gets the rest"
            )
        return {"max_train_minutes": other}

    def finish(self) -> None:
        """Write the inputs to make into the config, and what the run says at its start."""
        self.config.prepare = self.prepare
        if self.collection.images < FEW_IMAGES and self.stage != settings.AUTOENCODER:
            self.lines.append(
                f"{self.collection.images} images are few: the model will repeat some of them instead of making new "
                "ones; training/evaluate.py measures how many"
            )
        missing = [path for path, line in self.prepare.items() if incomplete(path, line.split()[0])]
        if missing and not self.config.dry_run:
            self.lines.append(f"made first: {', '.join(missing)}")
        self.lines.append(
            f"settings that were not given fit this collection and the device {get_device().type}; every one of them "
            "can be given as a flag (--help, --print_config)"
        )
        if self.config.time_budget and not self.saved:
            spent = time.perf_counter() - self._started + STARTING_SECONDS
            self.config.max_train_minutes = round(max(0.01, self.config.max_train_minutes - spent / 60), 2)
        self.lines = [*self.collection.lines(), *self.lines, *table.lines(table.decisions(self))]
        if self.config.dry_run and _is_first():
            self.lines += estimate.lines(self.trainings, 60 * self.config.max_train_minutes)
        if STARTED_BY not in os.environ:  # the command that started this one has said it
            self.config.announcements = tuple(self.lines)


def words(flags: Mapping[str, Any]) -> list[str]:
    """Return flags as the words of a command line."""
    return [word for name, value in flags.items() for word in (f"--{name}", written(value) or "null")]


def set_option(config: Options, name: str, value: Any) -> None:
    *groups, field = name.split(".")
    for group in groups:
        config = getattr(config, group)
    setattr(config, field, value)


def get_option(config: Options, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def get_saved(saved: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    value: Any = saved
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return otherwise
        value = value[part]
    return value
