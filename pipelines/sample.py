"""Pictures from a trained latent diffusion model, as a grid:

    python pipelines/sample.py --model runs/quickstart/latent_diffusion --prompt "a minimalist poster" --output grid.png

Several prompts (or class labels) give one row each. Column k is drawn from seed + k whatever the number of rows,
columns or pictures per batch, so that any one picture can be had again alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipelines.cli import UserError, entry_point, nearest

if TYPE_CHECKING:
    from PIL.Image import Image

GAP = 4  # pixels between pictures
PAPER = (255, 255, 255)
DTYPES = ("float32", "float16", "bfloat16")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def main(argv: Sequence[str] | None = None) -> int | None:
    options = parse_arguments(argv)
    output = Path(options.output).expanduser()
    _check_output(output)
    pipeline = _load(options)
    started = time.perf_counter()
    rows = generate(pipeline, options)
    elapsed_seconds = time.perf_counter() - started
    picture_grid(rows).save(output)
    sampler = type(pipeline.scheduler).__name__
    print(
        f"{len(rows)} x {len(rows[0])} pictures, {options.num_inference_steps} steps of {sampler}, "
        f"{elapsed_seconds:.1f} s: {output}"
    )
    return None


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line.

    Raises:
        UserError: an unknown option, with the nearest known one, or a value out of range.
    """
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, help="a pipeline folder, a run, a checkpoint of a run, or a Hub id")
    add("--checkpoint", help="of a run: best, latest or a folder's name (default: the finished pipeline, else best)")
    add("--prompt", nargs="+", action="extend", help="what to draw; several give a row each")
    add("--negative_prompt", help="what to steer away from; needs --guidance_scale above 1")
    add("--class_label", nargs="+", action="extend", help="class ids or names; several give a row each")
    add("--num_images", type=int, default=4, help="pictures in a row (default: 4)")
    add("--scheduler", help="ddim, ddpm, dpm, dpm_sde, euler, euler_ancestral, unipc, heun, lms (default: the model's)")
    add("--num_inference_steps", type=int, default=25, help="default: 25")
    add("--guidance_scale", type=float, default=2.5, help="1 is no guidance (default: 2.5)")
    add("--seed", type=int, default=0, help="of the first column; the next ones count up (default: 0)")
    add("--height", type=int, help="in pixels (default: the size it was trained at)")
    add("--width", type=int, help="in pixels (default: the size it was trained at)")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    add("--device", help="cpu, cuda, mps, ... (default: the best there is)")
    add("--batch_size", type=int, default=16, help="pictures made at once; the pictures do not depend on it")
    add("--output", default="grid.png", help="PNG to write (default: grid.png)")
    add("--trust_remote_code", action="store_true", help="run code that comes with a model of a class we do not have")
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [option.lstrip("-") for action in parser._actions for option in action.option_strings]
        flag = unknown[0].lstrip("-").split("=")[0]
        raise UserError(f"unknown argument {unknown[0]}{nearest(flag, known)} (--help lists the options)")
    for name in ("num_images", "num_inference_steps", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, but is {getattr(options, name)}")
    prompts, labels = len(options.prompt or []), len(options.class_label or [])
    if prompts > 1 and labels > 1 and prompts != labels:
        raise UserError(f"--prompt has {prompts} entries and --class_label {labels}; give one of them, or equally many")
    return options


def generate(pipeline: Any, options: argparse.Namespace) -> list[list[Image]]:
    """Rows (one for each prompt or label) of `num_images` pictures.

    Raises:
        UserError: what the pipeline finds wrong with the arguments.
    """
    import torch

    count = max(len(options.prompt or []), len(options.class_label or []), 1)
    prompts = _per_row(options.prompt, count)
    labels = _per_row([int(x) if x.isdecimal() else x for x in options.class_label or []] or None, count)
    wanted = [(row, column) for row in range(count) for column in range(options.num_images)]
    pictures: list[Image] = []
    for start in range(0, len(wanted), options.batch_size):
        batch = wanted[start : start + options.batch_size]
        try:
            pictures += pipeline(
                prompt=prompts and [prompts[row] for row, _ in batch],
                class_labels=labels and [labels[row] for row, _ in batch],
                negative_prompt=options.negative_prompt,
                height=options.height,
                width=options.width,
                num_inference_steps=options.num_inference_steps,
                guidance_scale=options.guidance_scale,
                # Without prompt and label there is one row, and its pictures are so many images of "nothing".
                num_images_per_prompt=1 if prompts or labels else len(batch),
                generator=[torch.Generator().manual_seed(options.seed + column) for _, column in batch],
            ).images
        except ValueError as error:
            raise UserError(str(error)) from error
    return [pictures[start : start + options.num_images] for start in range(0, len(pictures), options.num_images)]


def picture_grid(rows: Sequence[Sequence[Image]]) -> Image:
    """Rows of pictures of one size on white, with a small gap."""
    from PIL import Image as PILImage

    width, height = rows[0][0].size
    columns = max(len(row) for row in rows)
    sheet = PILImage.new("RGB", (columns * (width + GAP) + GAP, len(rows) * (height + GAP) + GAP), PAPER)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (GAP + x * (width + GAP), GAP + y * (height + GAP)))
    return sheet


def best_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _load(options: argparse.Namespace) -> Any:
    import torch

    from pipelines.loading import find_pipeline, load_pipeline

    # Looked for before the slow imports, so that a mistyped path is told at once.
    folder = find_pipeline(options.model, options.checkpoint)
    _quiet_loading()
    dtype = getattr(torch, options.dtype)
    pipeline = load_pipeline(folder, dtype=dtype, trust_remote_code=options.trust_remote_code)
    if not hasattr(pipeline, "set_scheduler"):
        raise UserError(f"{folder} holds a {type(pipeline).__name__}, which draws no pictures from noise")
    if options.scheduler:
        try:
            pipeline.set_scheduler(options.scheduler)
        except ValueError as error:
            raise UserError(f"--scheduler {options.scheduler}: {error}") from error
    device = options.device or best_device()
    try:
        return pipeline.to(device)
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device that it has not
        raise UserError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error


def _quiet_loading() -> None:
    """A bar for each of a handful of small files tells nothing; the one of the sampling steps stays."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _check_output(output: Path) -> None:
    """Found out before minutes of sampling rather than after."""
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--output must be a picture such as grid.png, but is {output}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("ab"):
            pass
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from None


def _per_row(values: list | None, count: int) -> list | None:
    return values * count if values and len(values) == 1 else values


if __name__ == "__main__":
    entry_point(main)
