"""Measure how well ControlNets follow their control images: a table and a grid of several, with the same seeds.

python training/evaluation/evaluate_controlnet.py --models '[runs/controlnet/add, runs/controlnet/gated]' \\
    --reader runs/posters/encoder_plain_64 --dataset_name data/posters_64 --table table.md --grid grid.png

Pictures are made without prompts, so that nothing but the control tells what to draw, and read back. Each is held
against its control; beside it, one made from the control of another picture.
N pictures, C control channels, R resolution.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.tools.cli import UserError, entry_point
from pipelines.tools.grids import comparison_grid, control_to_pil
from training.core.files import write_atomically, write_json
from training.core.options import Options, option
from training.core.parsing import parse_config
from training.core.previews import save_png
from training.engine.launch import threads_per_process
from training.metrics.control import ControlReader, control_iou, in_standard_errors, others
from training.metrics.images import to_pil

BATCH = 16
GRID_ROWS = 6


@dataclass
class ControlEvaluationConfig(Options):
    """Flags of evaluate_controlnet.py."""

    models: list[str] = field(default_factory=list)
    """Runs of train_controlnet.py, or their checkpoints or pipelines; all of one kind of control"""
    reader: str = ""
    """A layout encoder, or an autoencoder with a segmentation head, that reads the control from pictures"""
    dataset_name: str = ""
    """Pictures with controls, of the models' size"""
    conditioning_image_column: list[str] | str = field(default_factory=lambda: ["text_mask", "image_mask"])
    """Columns of the controls, as in training"""
    split: str = "test"
    """Controls are taken from here"""
    num_images: int = option(64, at_least=3)
    """How many of them"""
    num_inference_steps: int = 25
    """Sampling steps"""
    seed: int = 0
    """Picture i is drawn from seed + i"""
    device: str | None = None
    """Where models run: cpu, cuda, cuda:1, mps, ...; unset: the GPU if there is one, otherwise the CPU"""
    table: str | None = None
    """Where the table goes (Markdown); unset: only printed"""
    grid: str | None = None
    """Where a grid of controls and pictures goes (PNG); unset: no grid"""
    output: str | None = None
    """Where the figures go (JSON); unset: nowhere"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if not self.models or not self.reader or not self.dataset_name:
            raise UserError("--models, --reader and --dataset_name are needed; see --help")


def evaluate(config: ControlEvaluationConfig) -> dict[str, dict[str, float]]:
    """Figures of each model, by its name.

    Raises:
        UserError: no such model, reader or data, or models that take other controls.
    """
    from pipelines.tools.loading import load_on_device

    torch.set_num_threads(threads_per_process())
    figures: dict[str, dict[str, float]] = {}
    pictures: dict[str, Tensor] = {}
    for model in config.models:
        pipeline = load_on_device(model, config.device)
        if not hasattr(pipeline, "controlnet"):
            raise UserError(f"--models: {model} is a {type(pipeline).__name__}; name runs of train_controlnet.py")
        name = _name(model, pipeline)
        pipeline.set_progress_bar_config(desc=name)
        net = pipeline.controlnet.config
        real, controls = _data(config, net, pipeline)
        reader = ControlReader(config.reader, net.control_kind, net.control_names, net.conditioning_channels)
        reader.module.to(pipeline.device)
        if not pictures:
            pictures["base"] = _paint(pipeline, controls, config, scale=0.0)
        own, wrong = (_paint(pipeline, c, config) for c in (controls, others(controls)))
        pictures[name] = own
        figures[name] = _figures(reader, controls, own, wrong, pictures["base"], real) | _of_run(Path(model))
        figures[name]["parameters"] = sum(p.numel() for p in pipeline.controlnet.parameters())
    if config.grid:
        _save_grid(config.grid, controls, real, pictures)
    if config.output:
        write_json(config.output, figures)
    if config.table:
        write_atomically(Path(config.table), table(figures))
    return figures


def _name(model: str, pipeline: Any) -> str:
    path = Path(model)
    return path.name if path.name != "pipeline" else path.parent.name


def _data(config: ControlEvaluationConfig, net: Any, pipeline: Any) -> tuple[Tensor, Tensor]:
    """Real pictures (N 3 R R in [-1, 1]) and their controls (N C R R in [0, 1])."""
    from training.core.draws import SampleKey
    from training.data.companions import control_of
    from training.data.images import DataConfig, ImageDataset, load_split

    size = pipeline.unet.config.sample_size * getattr(pipeline, "vae_scale_factor", 1)
    data_config = DataConfig(dataset_name=config.dataset_name, resolution=size)
    classes = net.conditioning_channels if net.control_kind == "classes" else 0
    mode: Any = {"image": "rgb", "masks": "l"}.get(net.control_kind)
    control = control_of(config.conditioning_image_column, classes, mode)
    if control.channels != net.conditioning_channels:
        raise UserError(
            f"--conditioning_image_column {config.conditioning_image_column} gives {control.channels} channels; "
            f"the models take {net.conditioning_channels} ({', '.join(net.control_names) or net.control_kind})"
        )
    rows = load_split(data_config, config.split, 0)
    data = ImageDataset(rows, data_config, captions=False, control=control, augment=False)
    batch = data.collate(data.__getitems__([SampleKey(i, 0) for i in range(min(config.num_images, len(data)))]))
    return batch["pixel_values"], batch["conditioning_pixel_values"]


def _paint(pipeline: Any, controls: Tensor, config: ControlEvaluationConfig, scale: float = 1.0) -> Tensor:
    """N 3 R R in [-1, 1]."""
    painted = []
    for start in range(0, len(controls), BATCH):
        some = controls[start : start + BATCH]
        generators = [torch.Generator().manual_seed(config.seed + start + i) for i in range(len(some))]
        painted.append(
            pipeline(
                control_image=some,
                controlnet_conditioning_scale=scale,
                generator=generators,
                num_inference_steps=config.num_inference_steps,
                output_type="pt",
            ).images.cpu()
        )
    return torch.cat(painted) * 2 - 1


def _figures(
    reader: ControlReader, controls: Tensor, own: Tensor, wrong: Tensor, base: Tensor, real: Tensor
) -> dict[str, float]:
    ious = {
        name: control_iou(reader(images), controls).double()
        for name, images in (("control", own), ("shuffled", wrong), ("base", base), ("real", real))
    }
    gain = ious["control"] - ious["shuffled"]
    in_errors = in_standard_errors(float(gain.sum()), float(gain.square().sum()), len(gain))
    return {f"{name}_iou": float(iou.mean()) for name, iou in ious.items()} | {"gain_in_standard_errors": in_errors}


def _of_run(folder: Path) -> dict[str, float]:
    """What the run's own log says: its last sensitivities, and its speed."""
    log = folder / "metrics.csv"
    if not log.is_file():
        return {}
    with log.open() as lines:
        rows = list(csv.DictReader(lines))
    found: dict[str, float] = {}
    for key, name in (("val_control_sensitivity", "sensitivity"), ("val_shuffled_sensitivity", "shuffled_sensitivity")):
        values = [float(row[key]) for row in rows if row.get(key)]
        found |= {name: values[-1]} if values else {}
    speeds = sorted(float(row["images_per_second"]) for row in rows if row.get("images_per_second"))
    return found | ({"images_per_second": speeds[len(speeds) // 2]} if speeds else {})


def table(figures: dict[str, dict[str, float]]) -> str:
    """Markdown, a line for each model."""
    columns = {
        "control_iou": "control IoU", "shuffled_iou": "shuffled control", "base_iou": "base alone",
        "real_iou": "real pictures", "gain_in_standard_errors": "gain in standard errors",
        "sensitivity": "sensitivity", "shuffled_sensitivity": "to a shuffled control", "parameters": "parameters",
        "images_per_second": "images/s",
    }  # fmt: skip
    lines = [["model", *columns.values()], ["---"] + ["---:"] * len(columns)]
    for name, values in figures.items():
        lines.append([name, *(_cell(key, values.get(key)) for key in columns)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return ""
    if key == "parameters":
        return f"{value / 1e6:.2f} M"
    return f"{value:.1f}" if key in ("gain_in_standard_errors", "images_per_second") else f"{value:.3f}"


def _save_grid(path: str, controls: Tensor, real: Tensor, pictures: dict[str, Tensor]) -> None:
    rows = [
        [control_to_pil(controls[i]), to_pil(real[i]), *(to_pil(images[i]) for images in pictures.values())]
        for i in range(min(GRID_ROWS, len(controls)))
    ]
    save_png(comparison_grid(rows, ["control", "its real poster", "base alone", *list(pictures)[1:]]), path)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(ControlEvaluationConfig, argv, description=__doc__)
    print(table(evaluate(config)), end="")


if __name__ == "__main__":
    entry_point(main)
