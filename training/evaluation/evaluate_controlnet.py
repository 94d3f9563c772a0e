"""Measure how well ControlNets follow their control images, and compare several in a table and a grid.

python training/evaluation/evaluate_controlnet.py --models '[runs/controlnet/add, runs/controlnet/gated]' \\
    --reader runs/posters/encoder_plain_64 --dataset_name data/posters_64 --table table.md --grid grid.png

Images are generated without prompts, so that only the control determines their content. A reader model then reads the
control from each image, and the result is compared with the true control, for images generated from it and for images
generated from the control of another image. All models use the same seeds.
N images, C control channels, R resolution.
"""

from __future__ import annotations

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
from training.run.metrics_log import read_metrics

BATCH = 16
GRID_ROWS = 6


@dataclass
class ControlEvaluationConfig(Options):
    """Flags of evaluate_controlnet.py."""

    models: list[str] = field(default_factory=list)
    """ControlNets (required), e.g. '[runs/controlnet/add,runs/controlnet/gated]': run folders of
    train_controlnet.py, checkpoints or pipeline folders, all with the same kind of control"""
    reader: str = ""
    """Layout encoder, or autoencoder with a segmentation head, that reads the control from images (required): run
    folder, checkpoint, pipeline folder or Hub id"""
    dataset_name: str = ""
    """Images with control images (required), of the same size as the models' images"""
    conditioning_image_column: list[str] | str = field(default_factory=lambda: ["text_mask", "image_mask"])
    """Columns with control images, as in training"""
    split: str = "test"
    """Split with the control images"""
    num_images: int = option(64, at_least=3)
    """Number of control images"""
    num_inference_steps: int = 25
    """Number of sampling steps"""
    seed: int = 0
    """Random seed; image i is generated with seed + i"""
    device: str | None = None
    """Device for the models: cpu, cuda, cuda:1, mps, ...; if unset, the GPU if there is one, otherwise the CPU"""
    table: str | None = None
    """File for the table (Markdown); if unset, it is only printed"""
    grid: str | None = None
    """File for a grid of control images and generated images (PNG); if unset, no grid is written"""
    output: str | None = None
    """File for the metrics (JSON); if unset, no file is written"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if not self.models or not self.reader or not self.dataset_name:
            raise UserError("--models, --reader and --dataset_name are required; see --help")


def evaluate(config: ControlEvaluationConfig) -> dict[str, dict[str, float]]:
    """Compute the metrics of each model, by its name.

    Raises:
        UserError: a model, the reader or the data do not exist, or a model takes another kind of control.
    """
    from pipelines.tools.loading import load_on_device

    torch.set_num_threads(threads_per_process())
    metrics: dict[str, dict[str, float]] = {}
    generated: dict[str, Tensor] = {}
    for model in config.models:
        pipeline = load_on_device(model, config.device)
        if not hasattr(pipeline, "controlnet"):
            raise UserError(f"--models: {model} is a {type(pipeline).__name__}; give runs of train_controlnet.py")
        name = _name(model, pipeline)
        pipeline.set_progress_bar_config(desc=name)
        net = pipeline.controlnet.config
        real, controls = _data(config, net, pipeline)
        reader = ControlReader(config.reader, net.control_kind, net.control_names, net.conditioning_channels)
        reader.module.to(pipeline.device)
        if not generated:
            generated["base"] = _generate(pipeline, controls, config, scale=0.0)
        own, mismatched = (_generate(pipeline, c, config) for c in (controls, others(controls)))
        generated[name] = own
        metrics[name] = _metrics(reader, controls, own, mismatched, generated["base"], real) | _of_run(Path(model))
        metrics[name]["parameters"] = sum(p.numel() for p in pipeline.controlnet.parameters())
    if config.grid:
        _save_grid(config.grid, controls, real, generated)
    if config.output:
        write_json(config.output, metrics)
    if config.table:
        write_atomically(Path(config.table), table(metrics))
    return metrics


def _name(model: str, pipeline: Any) -> str:
    path = Path(model)
    return path.name if path.name != "pipeline" else path.parent.name


def _data(config: ControlEvaluationConfig, net: Any, pipeline: Any) -> tuple[Tensor, Tensor]:
    """Return real images (N 3 R R in [-1, 1]) and their controls (N C R R in [0, 1])."""
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
            f"--conditioning_image_column {config.conditioning_image_column} gives {control.channels} channels, "
            f"but the models take {net.conditioning_channels} ({', '.join(net.control_names) or net.control_kind})"
        )
    rows = load_split(data_config, config.split, 0)
    data = ImageDataset(rows, data_config, captions=False, control=control, augment=False)
    batch = data.collate(data.__getitems__([SampleKey(i, 0) for i in range(min(config.num_images, len(data)))]))
    return batch["pixel_values"], batch["conditioning_pixel_values"]


def _generate(pipeline: Any, controls: Tensor, config: ControlEvaluationConfig, scale: float = 1.0) -> Tensor:
    """Generate one image for each control: N 3 R R in [-1, 1]."""
    generated = []
    for start in range(0, len(controls), BATCH):
        some = controls[start : start + BATCH]
        generators = [torch.Generator().manual_seed(config.seed + start + i) for i in range(len(some))]
        generated.append(
            pipeline(
                control_image=some,
                controlnet_conditioning_scale=scale,
                generator=generators,
                num_inference_steps=config.num_inference_steps,
                output_type="pt",
            ).images.cpu()
        )
    return torch.cat(generated) * 2 - 1


def _metrics(
    reader: ControlReader, controls: Tensor, own: Tensor, mismatched: Tensor, base: Tensor, real: Tensor
) -> dict[str, float]:
    ious = {
        name: control_iou(reader(images), controls).double()
        for name, images in (("control", own), ("shuffled", mismatched), ("base", base), ("real", real))
    }
    gain = ious["control"] - ious["shuffled"]
    in_errors = in_standard_errors(float(gain.sum()), float(gain.square().sum()), len(gain))
    return {f"{name}_iou": float(iou.mean()) for name, iou in ious.items()} | {"gain_in_standard_errors": in_errors}


def _of_run(folder: Path) -> dict[str, float]:
    """Read the last sensitivities and the median speed from the log of the run."""
    log = folder / "metrics.csv"
    if not log.is_file():
        return {}
    rows = read_metrics(log)
    logged: dict[str, float] = {}
    for key, name in (("val_control_sensitivity", "sensitivity"), ("val_shuffled_sensitivity", "shuffled_sensitivity")):
        values = [float(row[key]) for row in rows if row.get(key)]
        logged |= {name: values[-1]} if values else {}
    speeds = sorted(float(row["images_per_second"]) for row in rows if row.get("images_per_second"))
    return logged | ({"images_per_second": speeds[len(speeds) // 2]} if speeds else {})


def table(metrics: dict[str, dict[str, float]]) -> str:
    """Format the metrics as a Markdown table with one row per model."""
    columns = {
        "control_iou": "control IoU", "shuffled_iou": "shuffled control", "base_iou": "base alone",
        "real_iou": "real images", "gain_in_standard_errors": "gain in standard errors",
        "sensitivity": "sensitivity", "shuffled_sensitivity": "to a shuffled control", "parameters": "parameters",
        "images_per_second": "images/s",
    }  # fmt: skip
    lines = [["model", *columns.values()], ["---"] + ["---:"] * len(columns)]
    for name, values in metrics.items():
        lines.append([name, *(_cell(key, values.get(key)) for key in columns)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return ""
    if key == "parameters":
        return f"{value / 1e6:.2f} M"
    return f"{value:.1f}" if key in ("gain_in_standard_errors", "images_per_second") else f"{value:.3f}"


def _save_grid(path: str, controls: Tensor, real: Tensor, generated: dict[str, Tensor]) -> None:
    rows = [
        [control_to_pil(controls[i]), to_pil(real[i]), *(to_pil(images[i]) for images in generated.values())]
        for i in range(min(GRID_ROWS, len(controls)))
    ]
    save_png(comparison_grid(rows, ["control", "real image", "base alone", *list(generated)[1:]]), path)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(ControlEvaluationConfig, argv, description=__doc__)
    print(table(evaluate(config)), end="")


if __name__ == "__main__":
    entry_point(main)
