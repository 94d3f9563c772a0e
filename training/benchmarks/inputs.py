"""Flags of the benchmark, and what it trains and samples with: posters, photographs, tokenizer, autoencoder, latents,
and a diffusion model with its initial weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from pipelines.tools.resources import shipped_path
from training.benchmarks.children import in_child, run_scripts, usable_cores
from training.core.options import Options, option

QUICKSTART = shipped_path("configs/experiments/latent_diffusion/quickstart_unet.yaml")
QUICKSTART_AUTOENCODER = "configs/experiments/autoencoder/quickstart.yaml"
PHOTO_SIDE = 512
PARTS = (
    "loop",
    "latents",
    "pipeline",
    "sampling",
    "memory",
    "start",
    "loading",
    "accelerator",
    "posters",
    "decoder",
    "captions",
    "scale",
)
DEFAULT_PARTS = PARTS[:8]
TINY_MODEL = {"block_out_channels": [32, 32], "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8}
TINY_TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_length": 24}
TINY_AUTOENCODER = "--model.block_out_channels [16,16] --model.norm_num_groups 8"


@dataclass
class BenchmarkConfig(Options):
    """Flags of run.py."""

    only: list[str] = option(list(DEFAULT_PARTS), choices=PARTS)
    """Parts of the benchmark to run. posters, decoder, captions and scale run only if they are named here"""
    quick: bool = option(False)
    """Measure everything once, with tiny networks, to check that the benchmark works"""
    pairs: int = option(3, at_least=1)
    """Number of pairs of processes that measure the speed and the memory of the loop"""
    steps: int = option(40, at_least=10)
    """Number of measured steps in each process"""
    threads: int = option(0, at_least=0)
    """Number of CPU threads of torch; 0 uses all cores that are available to this process"""
    model: str = option("")
    """Trained model for the quality of samplers (a run of latent diffusion with its data); if unset, only their time is
    measured"""
    num_images: int = option(256, at_least=4)
    """With --model: number of images whose distance from real ones (KID) is measured for each sampler"""
    work_dir: str = option("")
    """Folder of the benchmark's own data and models; if unset, runs/bench, and runs/bench_quick with --quick"""
    output: str = option("")
    """Markdown file of the results, beside which they are kept as JSON; if unset, docs/benchmarks.md, and
    runs/bench_quick.md with --quick"""

    @property
    def work(self) -> Path:
        return Path(self.work_dir or ("runs/bench_quick" if self.quick else "runs/bench")).resolve()

    @property
    def page(self) -> Path:
        return Path(self.output or ("runs/bench_quick.md" if self.quick else "docs/benchmarks.md"))

    @property
    def thread_count(self) -> int:
        return self.threads or usable_cores()

    def times(self, usual: int) -> int:
        """Return how often something is measured: `usual`, or once with --quick."""
        return 1 if self.quick else usual


@dataclass(frozen=True)
class Inputs:
    """Where the data and models of the benchmark are."""

    folder: Path

    @property
    def posters(self) -> Path:
        return self.folder / "posters"

    @property
    def photos(self) -> Path:
        """A folder of JPEG files of 512 × 512 pixels."""
        return self.folder / "photos"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def autoencoder(self) -> Path:
        return self.folder / "autoencoder"

    @property
    def latents(self) -> Path:
        return self.folder / "mirrored_latents"

    @property
    def model(self) -> Path:
        """The pipeline of the recipe with its initial weights."""
        return self.folder / "model"

    @property
    def recipe(self) -> Path:
        """Config file of train_latent_diffusion.py."""
        return self.folder / "config.yaml"

    @property
    def tiny_recipe(self) -> Path:
        """The same with a tiny network."""
        return self.folder / "tiny.yaml"


def make_inputs(config: BenchmarkConfig) -> Inputs:
    """Make the inputs that are missing in the work folder."""
    inputs = Inputs(config.work)
    inputs.folder.mkdir(parents=True, exist_ok=True)
    write_recipes(inputs, config.quick)
    if not inputs.photos.exists():
        make_photos(inputs.photos, 16 if config.quick else 400)
    if commands := _missing(inputs, config.quick):
        print(f"making {', '.join(commands)} ...", flush=True)
        in_child(config.quick, run_scripts, [command.split() for command in commands.values()])
    if not inputs.model.exists():
        in_child(config.quick, save_initial_model, str(inputs.recipe), str(inputs.model))
    return inputs


def _missing(inputs: Inputs, quick: bool) -> dict[str, str]:
    """Return the commands that make what is missing, by the name of what they make."""
    posters, steps, flags = (72, 1, TINY_AUTOENCODER) if quick else (700, 20, "")
    data = f"--dataset_name {inputs.posters}"
    commands = {
        inputs.posters: f"data_scripts/make_posters.py --output_dir {inputs.posters} --num_posters {posters} "
        "--resolution 64 --num_workers 1",
        inputs.tokenizer: f"data_scripts/train_tokenizer.py {data} --output_dir {inputs.tokenizer}",
        inputs.autoencoder / "pipeline": f"training/train_autoencoder.py --config {QUICKSTART_AUTOENCODER} {data} "
        f"--output_dir {inputs.autoencoder} --max_train_steps {steps} --report_to none --preview_epochs 0 "
        f"--validation_epochs 0 --checkpointing_epochs 0 {flags}",
        inputs.latents / "cache.json": f"data_scripts/precompute_latents.py {data} --resolution 64 --vae "
        f"{inputs.autoencoder} --output_dir {inputs.latents} --random_flip true",
    }
    return {path.relative_to(inputs.folder).parts[0]: line for path, line in commands.items() if not path.exists()}


def write_recipes(inputs: Inputs, quick: bool) -> None:
    """Write the quickstart's config for the benchmark's own data, and the same with a tiny network."""
    values = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    values.pop("prepare")
    paths = {"dataset_name": inputs.posters, "tokenizer": inputs.tokenizer, "vae": inputs.autoencoder}
    values |= {name: str(path) for name, path in (paths | {"latent_cache": inputs.latents}).items()}
    values |= {"validation_epochs": 0, "preview_epochs": 0, "checkpointing_epochs": 0, "report_to": "none"}
    values |= {"train_batch_size": 32, "logging_steps": 10}
    # As in the bare loop, which has no caption prior and no mixed precision.
    values |= {"mixed_precision": "no", "caption_prior": {**values["caption_prior"], "hidden_size": 0}}
    tiny = {**values, "model": TINY_MODEL, "text_encoder": TINY_TEXT, "train_batch_size": 8}
    contents: dict[Path, dict[str, Any]] = {inputs.recipe: tiny if quick else values, inputs.tiny_recipe: tiny}
    for path, content in contents.items():
        path.write_text(yaml.safe_dump(content), encoding="utf-8")


def make_photos(folder: Path, count: int) -> None:
    """Write JPEG files of smooth random colours with some noise, which decode as slowly as photographs."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        colours = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        smooth = Image.fromarray(colours).resize((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.BICUBIC)
        noise = random.normal(0, 8, (PHOTO_SIDE, PHOTO_SIDE, 1))
        pixels = np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04}.jpg", quality=90)


def save_initial_model(recipe: str, folder: str) -> None:
    """Save the pipeline of a recipe of latent diffusion with its initial weights."""
    from training.core.parsing import parse_config
    from training.core.stage import StageContext
    from training.train_latent_diffusion import Config, LatentDiffusionStage

    config = parse_config(Config, ["--config", recipe, "--output_dir", "unused"])
    LatentDiffusionStage(config, StageContext()).pipeline().save_pretrained(folder)
