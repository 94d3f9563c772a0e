"""Completes the config of a training command for a collection of images: what is not given is decided here.

A training script passes one of these functions to `parse_config`, which calls it if the command names a source of
images and no YAML file.
"""

from __future__ import annotations

import functools
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.tools.cli import UserError
from pipelines.tools.commands import command
from pipelines.tools.devices import bf16_products_are_faster, get_device
from pipelines.tools.private import expand_home
from training.core.files import read_json_object
from training.core.made_folders import incomplete
from training.core.options import Options
from training.core.parsing import written
from training.data.source import DataConfig
from training.engine.signals import STARTED_BY
from training.models.autoencoder import AutoencoderModelConfig
from training.models.vae_loading import PIXELS
from training.recipes import estimate, settings
from training.recipes.collection import FEW_IMAGES, Collection, look_at
from training.recipes.folders import collection_folder
from training.run.folder import RunFolder

# Options of the data, and of every training, that are passed on to the commands that make the inputs.
_DATA = tuple(DataConfig.__dataclass_fields__)
_SHARED = ("seed", "report_to", "tracker_project_name", "cpu_threads", "mixed_precision", "dataloader_num_workers")
_DATA_OF_CONTROLS = ("dataset_name", "dataset_config_name", "train_data_dir", "image_column", "on_bad_sample")
# What may change when a run is resumed; all other decisions stay as the run was started with them.
_FREE = ("max_train_steps",)
CONTROL_KIND = "soft_edges"
# What a run that begins with the weights of another one has from it: the networks, and what they were trained with.
_OF_ORIGIN = ("model.", "transformer.", "text_encoder.", "prediction_type")
# The part of --max_train_minutes that the training of an input gets: the autoencoder, as in the quickstart, and the
# base model of a ControlNet.
AUTOENCODER_SHARE, BASE_MODEL_SHARE = 1 / 3, 2 / 3

Complete = Callable[[Any, frozenset[str]], None]


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
        config = self.config
        self.collection: Collection = look_at(config, config.seed)
        self.folder: Path = collection_folder(config.source, write=_is_first() and config.trains)
        self.prepare: dict[str, str] = {}
        self.lines: list[str] = self.collection.lines()
        self.trainings: list[estimate.Training] = []

    def decide(self, name: str, value: Any) -> None:
        """Set an option that is not given."""
        if name not in self.given:
            _set(self.config, name, value)

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

    def own_settings(self, leave_out: str = "", **situation: Any) -> None:
        """Set what is not given, and what an earlier session of the run has not decided, for this stage.

        Args:
            leave_out: beginning of the names of options that keep their defaults.
        """
        chosen = self.settings(self.stage, **situation)
        if leave_out:
            chosen = {name: value for name, value in chosen.items() if not name.startswith(leave_out)}
        saved = self.saved
        for name, value in settings.kept(chosen, self.given).items():
            if saved and name not in _FREE:
                # An option that did not exist when the run began keeps its default.
                self.decide(name, _get(saved, name, _get_option(self.config, name)))
            else:
                self.decide(name, _get(self.origin, name, value) if name.startswith(_OF_ORIGIN) else value)
        usual = chosen["max_train_steps"]
        if 0 < self.config.max_train_steps < usual:
            self.lines.append(
                f"--max_train_steps {self.config.max_train_steps} limits every training of this command; without it, "
                f"the last one would have {usual:,} steps"
            )
        self._lower_batch()

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

    def needs(self, path: Path, script: str, flags: Mapping[str, Any], pass_on: Iterable[str] = _DATA) -> Path:
        """Note that the run needs `path`, which `script` makes; return the folder."""
        words = [
            script,
            *_words({**{name: getattr(self.config, name) for name in pass_on if name in self.given}, **flags}),
        ]
        self.prepare[str(path)] = shlex.join(words)
        return path

    def capped(self, stage: str, **situation: Any) -> dict[str, Any]:
        """Return the flags that limit another training as this one is limited."""
        if "max_train_steps" not in self.given or not self.config.max_train_steps:
            return {}
        steps = self.settings(stage, **situation)["max_train_steps"]
        return {"max_train_steps": min(steps, self.config.max_train_steps)}

    def minutes_for(self, what: str, share: float) -> dict[str, Any]:
        """Give a share of the time limit, if there is one, to the training of an input; return its flag."""
        minutes = self.config.max_train_minutes
        if not minutes:
            return {}
        other = round(share * minutes, 2)
        self.config.max_train_minutes = round(minutes - other, 2)
        self.lines.append(
            f"--max_train_minutes {minutes:g}: {other:g} are for the {what}, and {self.config.max_train_minutes:g} for "
            "the last training"
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
        if self.config.dry_run and _is_first():
            self.lines += estimate.lines(self.trainings)
        if STARTED_BY not in os.environ:  # the command that started this one has said it
            self.config.announcements = tuple(self.lines)


def for_own_images(complete: Complete) -> Complete:
    """Call `complete` only if the command names a source of images and does not turn the choice of settings off."""

    @functools.wraps(complete)
    def complete_if_wanted(config: Any, given: frozenset[str]) -> None:
        if config.source and config.auto_settings:
            complete(config, given)

    return complete_if_wanted


@for_own_images
def complete_autoencoder(config: Any, given: frozenset[str]) -> None:
    """Complete the config of train_autoencoder.py for the images that it names."""
    run = Completion(config, given, settings.AUTOENCODER)
    run.decide("output_dir", str(run.folder / f"autoencoder_{config.resolution}"))
    # Another kind of autoencoder is built in another way: what is not given then keeps its default.
    own_network = given & {"model.class_name", "model.patch_size"}
    run.own_settings(leave_out="model." if own_network else "")
    batch, steps = config.train_batch_size, run.steps
    run.trainings.append(
        estimate.autoencoder("autoencoder", config.model, config.resolution, steps, batch, run.collection.images)
    )
    run.finish()


@for_own_images
def complete_latent_diffusion(config: Any, given: frozenset[str]) -> None:
    """Complete the config of train_latent_diffusion.py for the images that it names."""
    run = Completion(config, given, settings.DIFFUSION)
    run.decide("condition_on", _conditions(run))
    for name in ("vae", "tokenizer"):  # the weights were trained with them
        if run.origin.get(name) and name not in given:
            setattr(config, name, expand_home(run.origin[name]))
    size = config.resolution
    run.decide("denoiser", run.origin.get("denoiser", config.denoiser))
    if not config.vae and config.denoiser == "transformer":
        config.vae = PIXELS
    own_vae = str(run.folder / f"autoencoder_{size}")
    suffix = f"_{_short(config.vae)}" if config.vae not in ("", own_vae) else ""
    name = f"latent_diffusion_{size}{suffix}_{_kind(config.condition_on)}"
    run.decide("output_dir", str(run.folder / (f"{name}_finetuned" if config.init_from else name)))
    run.decide("condition_on", run.saved.get("condition_on", config.condition_on))
    if config.with_captions and not (config.tokenizer or config.pretrained_text_encoder):
        config.tokenizer = str(_tokenizer(run))
    if not config.vae:
        config.vae = str(_autoencoder(run))
    began_without_cache = not run.saved.get("latent_cache", "unknown")
    varies = not config.center_crop or config.crop_scale < 1  # a cache would keep one crop of each image
    if config.vae != PIXELS and not config.latent_cache and not varies and not began_without_cache:
        config.latent_cache = str(_latents(run, suffix))
    cells, channels = _latent_shape(run)
    widths = config.model.block_out_channels if "model.block_out_channels" in given else ()
    transformer = config.denoiser == "transformer"
    run.own_settings(cells=cells, widths=widths, transformer=transformer)
    classes = len(run.collection.classes) if config.with_labels else 0
    images = run.collection.images
    run.trainings.append(estimate.diffusion("latent diffusion", config, run.steps, (channels, cells), classes, images))
    run.finish()


@for_own_images
def complete_controlnet(config: Any, given: frozenset[str]) -> None:
    """Complete the config of train_controlnet.py for the images that it names."""
    run = Completion(config, given, settings.CONTROLNET)
    run.decide("output_dir", str(run.folder / f"controlnet_{config.resolution}_{config.fusion_mode}"))
    run.own_settings()
    path = None
    if not run.collection.control_images and "conditioning_image_column" not in given:
        path = run.folder / f"controls_{config.resolution}_{CONTROL_KIND}"
        run.needs(
            path,
            "data_scripts/make_controls.py",
            {"kind": CONTROL_KIND, "resolution": config.resolution, "output_dir": str(path)},
            pass_on=_DATA_OF_CONTROLS,
        )
        run.lines.append(f"control images are missing, so {CONTROL_KIND} are drawn from the images")
        run.decide("conditioning_image_mode", "l")
    if not config.base_model:  # last, since it takes longest
        config.base_model = str(_base_model(run))
    if path is not None:
        config.dataset_name, config.train_data_dir = str(path), None
    run.finish()


@for_own_images
def complete_image_caption(config: Any, given: frozenset[str]) -> None:
    """Complete the config of train_image_caption.py for the images that it names."""
    run = Completion(config, given, settings.JOINT)
    if not run.collection.caption_words:
        raise UserError(
            f"{config.source} has no captions, which this model learns together with the images; add them (see 'Where "
            f"can captions be' in docs/data.md), or train without captions: "
            f"{command('training/train_latent_diffusion.py')} --train_data_dir {config.source}"
        )
    run.decide("output_dir", str(run.folder / f"image_caption_{config.resolution}"))
    run.own_settings()
    run.finish()


def _conditions(run: Completion) -> list[str]:
    """Return what the images have: captions, classes, both or neither."""
    return [
        *(["caption"] if run.collection.caption_words else []),
        *(["label"] if run.collection.classes else []),
    ]


def _kind(conditions: Iterable[str]) -> str:
    return "_".join(sorted(conditions)) or "unconditional"


def _short(name: str) -> str:
    path = Path(name.rstrip("/"))
    return (path.parent if path.name == "pipeline" else path).name or "vae"


def _tokenizer(run: Completion) -> Path:
    path = run.folder / "tokenizer"
    return run.needs(path, "data_scripts/train_tokenizer.py", {"output_dir": str(path)})


def _autoencoder(run: Completion) -> Path:
    path = run.folder / f"autoencoder_{run.config.resolution}"
    flags = {
        "output_dir": str(path),
        **run.capped(settings.AUTOENCODER),
        **run.minutes_for("autoencoder", AUTOENCODER_SHARE),
    }
    run.needs(path / "pipeline", "training/train_autoencoder.py", flags, pass_on=(*_DATA, *_SHARED))
    usual = run.settings(settings.AUTOENCODER)
    trained = (read_json_object(path / "record.json") or {}).get("steps", usual["max_train_steps"])
    if incomplete(path / "pipeline", "training/train_autoencoder.py") is None and trained < usual["max_train_steps"]:
        run.lines.append(
            f"{path} was trained for {trained:,} steps only, and usually has {usual['max_train_steps']:,}: images will "
            f"be blurred; to train it again, rename or delete {run.folder}"
        )
    elif incomplete(path / "pipeline", "training/train_autoencoder.py"):
        chosen = {**usual, **flags}
        model = AutoencoderModelConfig()
        for name, value in chosen.items():
            if name.startswith("model."):
                _set(model, name.removeprefix("model."), value)
        steps, batch = chosen["max_train_steps"], chosen["train_batch_size"]
        size, images = run.config.resolution, run.collection.images
        run.trainings.append(estimate.autoencoder("autoencoder", model, size, steps, batch, images))
    return path


def _latents(run: Completion, suffix: str) -> Path:
    path = run.folder / f"latents_{run.config.resolution}{suffix}"
    flags = {"output_dir": str(path), "vae": run.config.vae}
    if run.collection.classes:
        flags["labels"] = "yes"
    pass_on = (*_DATA, "seed", "cpu_threads")
    run.needs(path / "cache.json", "data_scripts/precompute_latents.py", flags, pass_on=pass_on)
    return path


def _base_model(run: Completion) -> Path:
    kind = _kind(_conditions(run))
    path = run.folder / f"latent_diffusion_{run.config.resolution}_{kind}"
    cells = settings.latent_cells(run.config.resolution)
    limits = run.capped(settings.DIFFUSION, cells=cells) | run.minutes_for("base model", BASE_MODEL_SHARE)
    flags = {"output_dir": str(path), **limits}
    run.needs(path / "pipeline", "training/train_latent_diffusion.py", flags, pass_on=(*_DATA, *_SHARED))
    return path


def _latent_shape(run: Completion) -> tuple[int, int]:
    """Return (cells per side, channels) of the latents of the VAE, which may not have been made yet."""
    config = run.config
    if f"{config.vae}/pipeline" in run.prepare and incomplete(
        f"{config.vae}/pipeline", "training/train_autoencoder.py"
    ):
        return settings.latent_cells(config.resolution), settings.LATENT_CHANNELS
    from pipelines.common.latents import latent_shape
    from training.models.vae_loading import load_vae

    channels, height, _ = latent_shape(load_vae(config.vae), config.resolution, config.resolution)
    return height, channels


def _words(flags: Mapping[str, Any]) -> list[str]:
    """Return flags as the words of a command line."""
    return [word for name, value in flags.items() for word in (f"--{name}", written(value) or "null")]


def _set(config: Options, name: str, value: Any) -> None:
    *groups, field = name.split(".")
    for group in groups:
        config = getattr(config, group)
    setattr(config, field, value)


def _get_option(config: Options, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _get(saved: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    value: Any = saved
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return otherwise
        value = value[part]
    return value
