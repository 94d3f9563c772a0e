"""Generate images with a trained model and save them as a grid:

    python pipelines/sample.py --model runs/quickstart/latent_diffusion --prompt "a minimalist poster" --output grid.png
    python pipelines/sample.py --model runs/posters/decoder_64 --brief configs/briefs/swiss.yaml --output session_1.png
    python pipelines/sample.py --model runs/controlnet/add --control_image text_mask.png image_mask.png
    python pipelines/sample.py --model runs/image_caption/emoji_64 --pairs 8 --output pairs.png
    python pipelines/sample.py --model runs/my_images/latent_diffusion_64_caption --image photo.png --strength 0.6
    python pipelines/sample.py --model runs/quickstart/latent_diffusion --prompt "a bold poster" --output images/

Latent diffusion models take prompts or class labels, poster models take design briefs, and models with a ControlNet
take control images. Several prompts (or class labels, briefs or controls) give one row each; a row begins with its
control. Column k (from 0) uses seed + k regardless of the number of rows, columns and images per batch, so every image
can be generated again on its own. In the grid, images smaller than 128 pixels are upscaled by an integer factor.

With a folder as --output, each image is saved as a PNG file of its own, named after its row, prompt and seed. PNG
files (also of a grid) contain the prompt, the seed and the other settings as text metadata.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.common.distilled import given_or_default
from pipelines.common.poster_domain import COLORS, MAX_PICTURES, MAX_TEXT_BLOCKS, STYLES
from pipelines.common.words import warn_of_unknown_words
from pipelines.tools.adapters import add_lora_options, load_adapters, lora_texts
from pipelines.tools.cli import Options, UserError, entry_point, printable
from pipelines.tools.commands import command
from pipelines.tools.control_files import STEERING, add_control_options, controls_of, open_controls
from pipelines.tools.devices import DEVICE_HELP
from pipelines.tools.generated import Generated, batches_of, check_image_output, model_name, save
from pipelines.tools.grids import control_to_pil, image_grid
from pipelines.tools.guides import GUIDANCE_OPTIONS, add_guidance_options, guidance_arguments, guidance_texts
from pipelines.tools.image_files import IMAGE_OPTIONS, add_image_options, image_arguments, image_facts
from pipelines.tools.pairs import draw_prompts, generate_pairs, makes_pairs
from pipelines.tools.repeating import brief_text
from pipelines.tools.resources import BRIEFS, find_file

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from pipelines.common.design_brief import DesignBrief

    Controls = list[list[Tensor]]
    """The control of each row for each ControlNet, C H W in [0, 1]"""

DTYPES = ("float32", "float16", "bfloat16")
NUM_IMAGES = 4
MAX_SCALE = 64
CAPTION_OPTIONS = ("prompt", "negative_prompt", "class_label")
NUMBER_FIELDS = {
    "energy": "Mood, from 0 (calm) to 1 (energetic)",
    "formality": "Mood, from 0 (informal) to 1 (formal)",
    "warmth": "Warmth of the colours, from 0 (cold, blue) to 1 (warm, red)",
    "balance": "Balance of opposite sides of the page, from 0 (all elements in one quarter) to 1 (equal weights)",
    "equilibrium": "Position of the layout's centre of mass, from 0 (corner of the page) to 1 (centre)",
    "symmetry": "Symmetry of the layout about both axes and the centre of the page, from 0 (none) to 1 (perfect)",
    "regularity": "Regularity of alignments and distances, from 0 (irregular) to 1 (regular)",
    "rhythm": "Distribution of the elements over the quarters of the page, from 0.33 (least even) to 1 (even)",
    "density": "Density of the layout, from 0 (elements cover nothing or the whole page) to 1 (half of the page)",
    "hierarchy_contrast": "Differences in how strongly the elements attract the eye, from 0 (none) to 1 (largest)",
    "image_share": "Fraction of the page covered by images, from 0 to 1",
}
COUNT_FIELDS = {
    "text_blocks": f"Number of text blocks including the title, 0 to {MAX_TEXT_BLOCKS}",
    "pictures": f"Number of images on the poster, 0 to {MAX_PICTURES}",
}
PALETTE_HELP = (
    "Comma-separated colours in the order background, primary, accent, ink (three colours: background, primary, ink), "
    f"e.g. '#fff,#d33,black'. Each is #rgb, #rrggbb or one of {', '.join(COLORS)}"
)
BRIEF_FIELDS = ("style", "palette", *COUNT_FIELDS, *NUMBER_FIELDS)


def main(argv: Sequence[str] | None = None) -> int | None:
    options = parse_arguments(argv)
    check_image_output(options.output)
    briefs = read_briefs(options)
    control_files = open_controls(options.control_image or [])
    pipeline = _load(options)
    options.num_inference_steps, options.guidance_scale = given_or_default(
        pipeline, options.num_inference_steps, options.guidance_scale
    )
    _check_conditions(pipeline, options)
    if getattr(pipeline, "tokenizer", None) is not None:
        warn_of_unknown_words(pipeline.tokenizer, [*(options.prompt or []), options.negative_prompt or ""])
    if options.pairs is not None:
        _sample_pairs(pipeline, options)
        return None
    controls = controls_of(pipeline, control_files, options.height, options.width) if control_files else []
    started = time.perf_counter()
    joint = makes_pairs(pipeline)
    rows = draw_prompts(pipeline, options.prompt, options) if joint else generate(pipeline, options, briefs, controls)
    elapsed_seconds = time.perf_counter() - started
    seeds = [[options.seed + column for column in range(len(row))] for row in rows]
    conditions = _conditions(options, briefs, len(controls), len(rows))
    batches = batches_of(seeds[0], options.batch_size) if len(rows) == 1 else []  # otherwise they have several rows
    generated = Generated(rows, seeds, conditions, _settings(pipeline, options), batches)
    shown = [[control_to_pil(one) for one in row] for row in _per_row(controls, len(rows))]
    written = save(generated, options.output, scale=options.scale, controls=shown, titled=not options.no_titles)
    steps = "" if joint else f"{options.num_inference_steps} steps of {type(pipeline.scheduler).__name__}, "
    print(f"{len(rows)} x {len(rows[0])} images, {steps}{elapsed_seconds:.1f} s: {written}")
    return None


def _sample_pairs(pipeline: Any, options: argparse.Namespace) -> None:
    """Generate image–caption pairs, save them, and print the captions. Raises UserError."""
    started = time.perf_counter()
    images, captions = generate_pairs(pipeline, options)
    for caption in captions:
        print(printable(caption))
    seeds = [[options.seed + number] for number in range(len(images))]
    conditions = [{"caption": caption} for caption in captions]
    generated = Generated([[image] for image in images], seeds, conditions, _settings(pipeline, options))
    written = save(generated, options.output, scale=options.scale, sheet=image_grid(images, captions))
    print(f"{len(images)} pairs, {time.perf_counter() - started:.1f} s: {written}")


def _settings(pipeline: Any, options: argparse.Namespace) -> dict[str, str]:
    """Return the settings of all images, for their metadata."""
    settings = {"model": model_name(options.model)}
    if options.checkpoint:
        settings["checkpoint"] = Path(options.checkpoint).name
    settings |= lora_texts(options)
    if not makes_pairs(pipeline):
        settings |= guidance_texts(options) | image_facts(options)
        settings |= {"negative_prompt": options.negative_prompt} if options.negative_prompt else {}
    if not makes_pairs(pipeline) or options.pairs is not None:
        settings["num_inference_steps"] = str(options.num_inference_steps)
        settings["scheduler"] = type(pipeline.scheduler).__name__
        settings |= {"sampler": options.scheduler} if options.scheduler else {}
    settings |= {name: str(getattr(options, name)) for name in ("height", "width") if getattr(options, name)}
    given = {name: getattr(options, name) for name in STEERING if getattr(options, name) is not None}
    return settings | {name: ", ".join(f"{value:g}" for value in values) for name, values in given.items()}


def _conditions(
    options: argparse.Namespace, briefs: Sequence[DesignBrief], controls: int, count: int
) -> list[dict[str, str]]:
    """Return the conditions of each of `count` rows as texts, for its title and its metadata."""
    files = [Path(file).name for file in options.control_image or []]
    size = len(files) // max(1, controls)
    columns = {
        "prompt": options.prompt,
        "class_label": options.class_label,
        "brief": [brief_text(brief) for brief in briefs],
        "control_image": [", ".join(files[start * size : (start + 1) * size]) for start in range(controls)],
    }
    rows = {name: _per_row(list(values), count) for name, values in columns.items() if values}
    return [{name: values[row] for name, values in rows.items()} for row in range(count)]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        UserError: If an option is unknown (the message names the nearest known one) or a value is out of range.
    """
    parser = Options(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="Pipeline folder, run folder, checkpoint or Hub id")
    add(
        "--checkpoint",
        help="Checkpoint of a run: best, latest or a folder name"
        " (default: the final pipeline if it exists, otherwise the best checkpoint)",
    )
    _add_condition_options(parser)
    add("--pairs", type=int, help="Number of image–caption pairs to generate (only for models that generate both)")
    add("--num_images", type=int, default=NUM_IMAGES, help=f"Number of images per row (default: {NUM_IMAGES})")
    add(
        "--scheduler",
        help="Sampler: ddim, ddpm, dpm, dpm_sde, euler, euler_ancestral, unipc, heun or lms (default: the model's)",
    )
    add("--num_inference_steps", type=int, help="Number of sampling steps (default: 25, or that of a distilled model)")
    add_guidance_options(parser)
    add_image_options(parser)
    add_lora_options(parser)
    add("--seed", type=int, default=0, help="Random seed; column k uses seed + k (default: 0)")
    add("--height", type=int, help="Height of the images in pixels (default: the training size)")
    add("--width", type=int, help="Width of the images in pixels (default: the training size)")
    add("--dtype", choices=DTYPES, default="float32", help="Data type of the weights (default: float32)")
    add("--device", help=DEVICE_HELP)
    add(
        "--batch_size",
        type=int,
        default=16,
        help="Images per batch; another number may change their last bits (default: 16)",
    )
    _add_output_options(parser)
    add("--trust_remote_code", action="store_true", help="Run custom code that a model contains")
    options = parser.parse(argv)
    for name in ("num_images", "num_inference_steps", "batch_size", "pairs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, but is {getattr(options, name)}")
    if options.scale is not None and not 1 <= options.scale <= MAX_SCALE:
        raise UserError(f"--scale must be from 1 to {MAX_SCALE}, but is {options.scale}")
    prompts, labels = len(options.prompt or []), len(options.class_label or [])
    if prompts > 1 and labels > 1 and prompts != labels:
        raise UserError(f"--prompt has {prompts} entries and --class_label {labels}; give one of them, or equally many")
    return options


def _add_condition_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--prompt", nargs="+", action="extend", help="Prompts; each gives a row")
    add("--negative_prompt", help="Negative prompt; needs --guidance_scale above 1")
    add(
        "--class_label", nargs="+", action="extend", help="Class names (ids unless names are numbers); each gives a row"
    )
    add(
        "--brief",
        nargs="+",
        action="extend",
        help="Design briefs (poster models only): YAML files, see configs/briefs, or random (drawn with --seed); each "
        "gives a row (default: only the fields below)",
    )
    _add_brief_fields(parser)
    add_control_options(parser)


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--output",
        default="grid.png",
        help="Image file to write, or a folder such as images/ for a PNG file of each image (default: grid.png)",
    )
    add(
        "--scale",
        type=int,
        help="Factor by which images are enlarged, 1 to 64 (default: 1 for single files; in a grid, 1 or the smallest "
        "with which no image is smaller than 128 pixels)",
    )
    add("--no_titles", action="store_true", help="Write no prompt, class or control above the rows of the grid")


def _add_brief_fields(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "fields of the design brief; they override those of --brief, and the model chooses those that are not set"
    )
    group.add_argument("--style", help=f"One of {', '.join(STYLES)}")
    group.add_argument("--palette", help=PALETTE_HELP)
    for name, text in COUNT_FIELDS.items():
        group.add_argument(f"--{name}", type=int, help=text)
    for name, text in NUMBER_FIELDS.items():
        group.add_argument(f"--{name}", type=float, help=text)


def read_briefs(options: argparse.Namespace) -> list[DesignBrief]:
    """Read the design briefs of --brief, with their fields overridden by those on the command line.

    A random brief is printed as YAML, so that it can be used again.

    Raises:
        UserError: If a file cannot be read or a field is invalid.
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
    """Whether the pipeline takes design briefs instead of prompts and class labels."""
    return hasattr(pipeline, "brief_encoder")


def _check_conditions(pipeline: Any, options: argparse.Namespace) -> None:
    """Raise a UserError for an option that this kind of model does not accept."""
    if makes_pairs(pipeline) or options.pairs is not None:
        _check_pair_options(pipeline, options)
        return
    foreign = CAPTION_OPTIONS if takes_briefs(pipeline) else ("brief", *BRIEF_FIELDS)
    given = [name for name in foreign if getattr(options, name) is not None]
    if given:
        instead = "--brief, --style, --palette, ..." if takes_briefs(pipeline) else "--prompt or --class_label"
        raise UserError(f"{type(pipeline).__name__} does not accept --{given[0]}; use {instead}")
    given = [name for name in ("control_image", *STEERING) if getattr(options, name) is not None]
    if given and not takes_controls(pipeline):
        raise UserError(
            f"{type(pipeline).__name__} does not accept --{given[0]}, because it has no ControlNet; "
            f"use a model trained with `{command('training/train_controlnet.py')}`"
        )
    if given and options.control_image is None:
        raise UserError(f"--{given[0]} has no effect without a control image; add --control_image")
    if takes_controls(pipeline) and options.control_image is None:
        print("Generating without the ControlNet, because --control_image is not set.")


def _check_pair_options(pipeline: Any, options: argparse.Namespace) -> None:
    """Raise a UserError for an option that an image–caption model does not accept, or --pairs with another model."""
    if not makes_pairs(pipeline):
        raise UserError(
            f"{type(pipeline).__name__} does not accept --pairs; use an image–caption model, trained with "
            f"`{command('training/train_image_caption.py')}`"
        )
    if (options.pairs is None) == (options.prompt is None):
        raise UserError(
            f"{options.model} is an image–caption model; use either --pairs, such as --pairs 8 to generate 8 pairs, or "
            "--prompt to draw a caption"
        )
    foreign = ("class_label", "negative_prompt", "height", "width", "brief", *BRIEF_FIELDS, "control_image", *STEERING)
    foreign += GUIDANCE_OPTIONS + IMAGE_OPTIONS
    given = [name for name in foreign if getattr(options, name) is not None]
    if options.pairs is not None and options.num_images != NUM_IMAGES:
        given.append("num_images")
    if given:
        raise UserError(
            f"{type(pipeline).__name__} does not accept --{given[0]} together with "
            f"{'--prompt' if options.pairs is None else '--pairs'}; leave it out"
        )


def takes_controls(pipeline: Any) -> bool:
    """Whether the pipeline has a ControlNet."""
    return hasattr(pipeline, "control_tensors")


def generate(
    pipeline: Any,
    options: argparse.Namespace,
    briefs: Sequence[DesignBrief] = (),
    controls: Controls | None = None,
) -> list[list[Image]]:
    """Generate a row of `num_images` images for each prompt, class label, brief or control.

    Raises:
        UserError: If the pipeline rejects an argument.
    """
    import torch

    count = _row_count(options, briefs, controls or [])
    cells = [(row, column) for row in range(count) for column in range(options.num_images)]
    row_briefs, row_controls = _per_row(list(briefs), count), _per_row(controls or [], count)
    further = guidance_arguments(pipeline, options) | image_arguments(pipeline, options)
    images: list[Image] = []

    def conditions(rows: Sequence[int]) -> dict[str, Any]:
        steering = _steering(options, [row_controls[row] for row in rows]) if row_controls else {}
        if takes_briefs(pipeline):
            return {"briefs": [row_briefs[row] if row_briefs else {} for row in rows], **steering}
        captions = _captions(pipeline, options, rows, count)
        # With neither prompt nor label, the number of controls determines the number of images.
        return captions | steering | ({"num_images_per_prompt": 1} if steering else {})

    for start in range(0, len(cells), options.batch_size):
        batch = cells[start : start + options.batch_size]
        try:
            images += pipeline(
                **conditions([row for row, _ in batch]),
                height=options.height,
                width=options.width,
                num_inference_steps=options.num_inference_steps,
                guidance_scale=options.guidance_scale,
                **further,
                generator=[torch.Generator().manual_seed(options.seed + column) for _, column in batch],
            ).images
        except ValueError as error:
            raise UserError(str(error)) from error
    return [images[start : start + options.num_images] for start in range(0, len(images), options.num_images)]


def _row_count(options: argparse.Namespace, briefs: Sequence[Any], controls: Sequence[Any]) -> int:
    """Return the number of rows. Raises UserError if prompts (or labels, briefs) and controls differ in number."""
    entries = {"--prompt": options.prompt, "--class_label": options.class_label, "--brief": briefs}
    name, others = max(((n, len(values or [])) for n, values in entries.items()), key=lambda entry: entry[1])
    if len(controls) > 1 and others > 1 and len(controls) != others:
        raise UserError(
            f"--control_image has {len(controls)} controls and {name} {others} entries; give one of either, or equally "
            "many"
        )
    return max(others, len(controls), 1)


def _steering(options: argparse.Namespace, controls: Controls) -> dict[str, Any]:
    """Return a pipeline's arguments for these controls; each ControlNet takes a batch, B C H W."""
    import torch

    batches = [torch.stack(of_net) for of_net in zip(*controls, strict=True)]
    given = {name: getattr(options, name) for name in STEERING if getattr(options, name) is not None}
    strengths = {name: values[0] if len(values) == 1 else values for name, values in given.items()}
    return {"control_image": batches if len(batches) > 1 else batches[0], **strengths}


def _captions(pipeline: Any, options: argparse.Namespace, rows: Sequence[int], count: int) -> dict[str, Any]:
    """Return a pipeline's prompts and class labels for images of these rows, out of `count` rows."""
    prompts = _per_row(options.prompt, count)
    names = (pipeline.config.get("id2label") or {}).values()
    given = [int(x) if x.isdecimal() and x not in names else x for x in options.class_label or []]
    labels = _per_row(given or None, count)
    return {
        "prompt": prompts and [prompts[row] for row in rows],
        "class_labels": labels and [labels[row] for row in rows],
        "negative_prompt": options.negative_prompt,
        # With neither prompt nor label there is one row, whose images are all generated without a condition.
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
        raise UserError(f"--model {options.model} is a {type(pipeline).__name__}, which does not generate images")
    load_adapters(pipeline, options)
    if options.scheduler:
        try:
            pipeline.set_scheduler(options.scheduler)
        except ValueError as error:
            raise UserError(f"--scheduler {options.scheduler}: {error}") from error
    pipeline.set_progress_bar_config(disable=None, leave=False, desc="sampling", unit="step")
    return pipeline


def _per_row(values: Any, count: int) -> Any:
    """Repeat a list with a single entry for each of `count` rows; return other lists, and None, unchanged."""
    return values * count if values and len(values) == 1 else values


if __name__ == "__main__":
    entry_point(main)
