"""Pictures from a trained model, as a grid: from prompts or classes (latent diffusion) or design briefs (posters), with
control images where the model has a ControlNet:

    python pipelines/sample.py --model runs/quickstart/latent_diffusion --prompt "a minimalist poster" --output grid.png
    python pipelines/sample.py --model runs/posters/decoder_64 --brief configs/briefs/swiss.yaml --output session_1.png
    python pipelines/sample.py --model runs/posters/decoder_64 --style swiss --palette '#d33,#fff' --pictures 2
    python pipelines/sample.py --model runs/controlnet/add --control_image text_mask.png image_mask.png
    python pipelines/sample.py --model runs/image_caption/emoji_64 --pairs 8 --output pairs.png

Several prompts (or class labels, briefs, controls) give one row each; a row begins with its control. Column k is drawn
from seed + k whatever the number of rows, columns or pictures per batch, so that any one picture can be had again
alone. Pictures smaller than 128 pixels are shown enlarged by a whole factor.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.common.poster_domain import COUNTS, GRAMMAR, STYLES
from pipelines.tools.cli import Options, UserError, entry_point
from pipelines.tools.control_files import controls_of, open_controls
from pipelines.tools.devices import DEVICE_HELP
from pipelines.tools.files import check_output
from pipelines.tools.grids import control_to_pil, enlarged, plain_grid
from pipelines.tools.pairs import drawings, makes_pairs, sample_pairs
from pipelines.tools.resources import BRIEFS, find_file

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from pipelines.common.design_brief import DesignBrief

    Controls = list[list[Tensor]]
    """For each row and each ControlNet: C H W in [0, 1]"""

DTYPES = ("float32", "float16", "bfloat16")
NUM_IMAGES = 4
CAPTION_OPTIONS = ("prompt", "negative_prompt", "class_label")
NUMBER_FIELDS = ("energy", "formality", "warmth", *GRAMMAR)
BRIEF_FIELDS = ("style", "palette", *COUNTS, *NUMBER_FIELDS)
STEERING = {
    "controlnet_conditioning_scale": "how strongly it steers; 0 not at all (default: 1)",
    "control_guidance_start": "share of the steps before it steers (default: 0)",
    "control_guidance_end": "share of the steps after which it no longer does (default: 1)",
}


def main(argv: Sequence[str] | None = None) -> int | None:
    options = parse_arguments(argv)
    output = Path(options.output).expanduser()
    _check_output(output)
    briefs = read_briefs(options)
    control_files = open_controls(options.control_image or [])
    pipeline = _load(options)
    _check_conditions(pipeline, options)
    if options.pairs is not None:
        sample_pairs(pipeline, options, output)
        return None
    controls = controls_of(pipeline, control_files, options.height, options.width) if control_files else []
    started = time.perf_counter()
    both = makes_pairs(pipeline)
    rows = drawings(pipeline, options.prompt, options) if both else generate(pipeline, options, briefs, controls)
    elapsed_seconds = time.perf_counter() - started
    shown = [[control_to_pil(one) for one in row] for row in _per_row(controls, len(rows))] or [[]] * len(rows)
    plain_grid([[enlarged(p) for p in (*left, *right)] for left, right in zip(shown, rows, strict=True)]).save(output)
    steps = "" if both else f"{options.num_inference_steps} steps of {type(pipeline.scheduler).__name__}, "
    print(f"{len(rows)} x {len(rows[0])} pictures, {steps}{elapsed_seconds:.1f} s: {output}")
    return None


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line.

    Raises:
        UserError: an unknown option, with the nearest known one, or a value out of range.
    """
    parser = Options(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="a pipeline folder, a run, a checkpoint of a run, or a Hub id")
    add("--checkpoint", help="of a run: best, latest or a folder's name (default: the finished pipeline, else best)")
    add("--prompt", nargs="+", action="extend", help="what to draw; several give a row each")
    add("--negative_prompt", help="what to steer away from; needs --guidance_scale above 1")
    add("--class_label", nargs="+", action="extend", help="class ids or names; several give a row each")
    add("--brief", nargs="+", action="extend", help="a poster's brief: YAML files, or `random` (from --seed)")
    _add_brief_fields(parser)
    _add_control_options(parser)
    add("--pairs", type=int, help="new pictures with their captions, so many: for a model of both")
    add("--num_images", type=int, default=NUM_IMAGES, help=f"pictures in a row (default: {NUM_IMAGES})")
    add("--scheduler", help="ddim, ddpm, dpm, dpm_sde, euler, euler_ancestral, unipc, heun, lms (default: the model's)")
    add("--num_inference_steps", type=int, default=25, help="default: 25")
    add("--guidance_scale", type=float, default=2.5, help="1 is no guidance (default: 2.5)")
    add("--seed", type=int, default=0, help="of the first column; the next ones count up (default: 0)")
    add("--height", type=int, help="in pixels (default: the size it was trained at)")
    add("--width", type=int, help="in pixels (default: the size it was trained at)")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    add("--device", help=DEVICE_HELP)
    add("--batch_size", type=int, default=16, help="pictures made at once; the pictures do not depend on it")
    add("--output", default="grid.png", help="PNG to write (default: grid.png)")
    add("--trust_remote_code", action="store_true", help="run code that comes with a model of a class we do not have")
    options = parser.parse(argv)
    for name in ("num_images", "num_inference_steps", "batch_size", "pairs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, but is {getattr(options, name)}")
    prompts, labels = len(options.prompt or []), len(options.class_label or [])
    if prompts > 1 and labels > 1 and prompts != labels:
        raise UserError(f"--prompt has {prompts} entries and --class_label {labels}; give one of them, or equally many")
    return options


def _add_brief_fields(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("fields of the brief, each in place of what --brief says")
    group.add_argument("--style", help=", ".join(STYLES))
    group.add_argument("--palette", help="'#d33,#fff' or names: background, primary, accent, ink")
    for name in COUNTS:
        group.add_argument(f"--{name}", type=int, help="0 to 3")
    for name in NUMBER_FIELDS:
        group.add_argument(f"--{name}", type=float, help="0 to 1")


def _add_control_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("control, for models with a ControlNet; several values: one for each of its nets")
    files = "files of a control, in the order of the model's nets and channels; several controls give a row each"
    group.add_argument("--control_image", nargs="+", action="extend", help=files)
    for name, text in STEERING.items():
        group.add_argument(f"--{name}", nargs="+", type=float, help=text)


def read_briefs(options: argparse.Namespace) -> list[DesignBrief]:
    """The briefs that were asked for: of each --brief, its fields replaced by those on the command line.

    A random one is printed as YAML, so that it can be kept.

    Raises:
        UserError: a file or field that cannot be.
    """
    fields = {name: getattr(options, name) for name in BRIEF_FIELDS if getattr(options, name) is not None}
    if not options.brief and not fields:
        return []
    from pipelines.common.design_brief import DesignBrief

    briefs, seed = [], options.seed
    for source in options.brief or [None]:
        try:
            if source == "random":
                brief, seed = DesignBrief.random(seed), seed + 1
            else:
                brief = DesignBrief.from_yaml(find_file(source, BRIEFS)) if source else DesignBrief()
            briefs.append(dataclasses.replace(brief, **fields))
        except ValueError as error:
            raise UserError(str(error)) from error
        if source == "random":
            print(briefs[-1].to_yaml(), end="", flush=True)
    return briefs


def takes_briefs(pipeline: Any) -> bool:
    """Whether it paints from design briefs, rather than from captions and classes."""
    return hasattr(pipeline, "brief_encoder")


def _check_conditions(pipeline: Any, options: argparse.Namespace) -> None:
    """Raises UserError for what this kind of model knows nothing of."""
    if makes_pairs(pipeline) or options.pairs is not None:
        _check_pair_options(pipeline, options)
        return
    foreign = CAPTION_OPTIONS if takes_briefs(pipeline) else ("brief", *BRIEF_FIELDS)
    given = [name for name in foreign if getattr(options, name) is not None]
    if given:
        instead = (
            "a design brief: --brief, --style, --palette, ..."
            if takes_briefs(pipeline)
            else "--prompt or --class_label"
        )
        raise UserError(
            f"--{given[0]} says nothing to {options.model}, a {type(pipeline).__name__}; it takes {instead}"
        )
    given = [name for name in ("control_image", *STEERING) if getattr(options, name) is not None]
    if given and not takes_controls(pipeline):
        raise UserError(
            f"--{given[0]} says nothing to {options.model}, a {type(pipeline).__name__} without a ControlNet; "
            "name a run of train_controlnet.py"
        )
    if given and options.control_image is None:
        raise UserError(f"--{given[0]} says how a control steers, but there is none; give --control_image")
    if takes_controls(pipeline) and options.control_image is None:
        print("Without --control_image the base model alone paints.")


def _check_pair_options(pipeline: Any, options: argparse.Namespace) -> None:
    """Raises UserError for what a model of pictures and captions knows nothing of, and for --pairs with another."""
    if not makes_pairs(pipeline):
        raise UserError(
            f"--pairs wants a model of pictures and captions (training/train_image_caption.py), and {options.model} "
            f"is a {type(pipeline).__name__}"
        )
    if (options.pairs is None) == (options.prompt is None):
        raise UserError(
            f"{options.model} is a model of pictures and captions; give it --pairs 8 to invent as many pairs, or "
            "--prompt to draw what it says"
        )
    known = ("class_label", "negative_prompt", "height", "width", "brief", *BRIEF_FIELDS, "control_image", *STEERING)
    given = [name for name in known if getattr(options, name) is not None]
    if options.pairs is not None and options.num_images != NUM_IMAGES:
        given.append("num_images")
    if given:
        raise UserError(
            f"--{given[0]} says nothing to {options.model}, a {type(pipeline).__name__}, "
            f"with {'--prompt' if options.pairs is None else '--pairs'}; leave it out"
        )


def takes_controls(pipeline: Any) -> bool:
    """Whether it has a ControlNet."""
    return hasattr(pipeline, "control_tensors")


def generate(
    pipeline: Any,
    options: argparse.Namespace,
    briefs: Sequence[DesignBrief] = (),
    controls: Controls | None = None,
) -> list[list[Image]]:
    """Rows (one for each prompt, label, brief or control) of `num_images` pictures.

    Raises:
        UserError: what the pipeline finds wrong with the arguments.
    """
    import torch

    count = _row_count(options, briefs, controls or [])
    wanted = [(row, column) for row in range(count) for column in range(options.num_images)]
    row_briefs, row_controls = _per_row(list(briefs), count), _per_row(controls or [], count)
    pictures: list[Image] = []

    def conditions(rows: Sequence[int]) -> dict[str, Any]:
        steering = _steering(options, [row_controls[row] for row in rows]) if row_controls else {}
        if takes_briefs(pipeline):
            return {"briefs": [row_briefs[row] if row_briefs else {} for row in rows], **steering}
        captions = _captions(options, rows, count)
        # With neither prompt nor label the controls say how many pictures there are.
        return captions | steering | ({"num_images_per_prompt": 1} if steering else {})

    for start in range(0, len(wanted), options.batch_size):
        batch = wanted[start : start + options.batch_size]
        try:
            pictures += pipeline(
                **conditions([row for row, _ in batch]),
                height=options.height,
                width=options.width,
                num_inference_steps=options.num_inference_steps,
                guidance_scale=options.guidance_scale,
                generator=[torch.Generator().manual_seed(options.seed + column) for _, column in batch],
            ).images
        except ValueError as error:
            raise UserError(str(error)) from error
    return [pictures[start : start + options.num_images] for start in range(0, len(pictures), options.num_images)]


def _row_count(options: argparse.Namespace, briefs: Sequence[Any], controls: Sequence[Any]) -> int:
    """Raises UserError for several prompts (or labels, briefs) and another number of controls."""
    entries = {"--prompt": options.prompt, "--class_label": options.class_label, "--brief": briefs}
    name, others = max(((n, len(values or [])) for n, values in entries.items()), key=lambda entry: entry[1])
    if len(controls) > 1 and others > 1 and len(controls) != others:
        raise UserError(
            f"--control_image has {len(controls)} controls and {name} {others} entries; give one of either, or equally "
            "many"
        )
    return max(others, len(controls), 1)


def _steering(options: argparse.Namespace, controls: Controls) -> dict[str, Any]:
    """A pipeline's arguments for these controls: for each ControlNet a batch, B C H W."""
    import torch

    batches = [torch.stack(of_net) for of_net in zip(*controls, strict=True)]
    given = {name: getattr(options, name) for name in STEERING if getattr(options, name) is not None}
    strengths = {name: values[0] if len(values) == 1 else values for name, values in given.items()}
    return {"control_image": batches if len(batches) > 1 else batches[0], **strengths}


def _captions(options: argparse.Namespace, rows: Sequence[int], count: int) -> dict[str, Any]:
    """What a pipeline of captions and classes is asked for pictures of these rows, out of `count`."""
    prompts = _per_row(options.prompt, count)
    labels = _per_row([int(x) if x.isdecimal() else x for x in options.class_label or []] or None, count)
    return {
        "prompt": prompts and [prompts[row] for row in rows],
        "class_labels": labels and [labels[row] for row in rows],
        "negative_prompt": options.negative_prompt,
        # Without prompt and label there is one row, and its pictures are so many images of "nothing".
        "num_images_per_prompt": 1 if prompts or labels else len(rows),
    }


def _load(options: argparse.Namespace) -> Any:
    import torch

    from pipelines.tools.loading import load_on_device

    pipeline = load_on_device(
        options.model,
        options.device,
        options.checkpoint,
        dtype=getattr(torch, options.dtype),
        trust_remote_code=options.trust_remote_code,
    )
    if not hasattr(pipeline, "set_scheduler"):
        raise UserError(f"--model {options.model} is a {type(pipeline).__name__}, which draws no images from noise")
    if options.scheduler:
        try:
            pipeline.set_scheduler(options.scheduler)
        except ValueError as error:
            raise UserError(f"--scheduler {options.scheduler}: {error}") from error
    return pipeline


def _check_output(output: Path) -> None:
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--output must be a picture such as grid.png, but is {output}")
    check_output(output)


def _per_row(values: Any, count: int) -> Any:
    """A list with an entry for each row: of a single one its repetition; nothing as it is."""
    return values * count if values and len(values) == 1 else values


if __name__ == "__main__":
    entry_point(main)
