"""Caption pictures with a model of pictures and captions:

    python pipelines/caption.py photo.jpg drawing.png --model runs/image_caption/emoji_64
    python pipelines/caption.py *.png --model runs/image_caption/emoji_64 --num_beams 4 --output captions.jsonl

One line for each picture; pictures may have any size. --top_p draws captions instead of taking the likeliest.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.cli import Options, UserError, entry_point

if TYPE_CHECKING:
    from PIL.Image import Image


def main(argv: Sequence[str] | None = None) -> int | None:
    options = parse_arguments(argv)
    files = [Path(name).expanduser() for name in options.files]
    pictures = [_open(path) for path in files]
    output = Path(options.output).expanduser() if options.output else None
    if output is not None:
        _check_output(output)
    pipeline = load_captioner(options.model, options.device)
    captions: list[str] = []
    for start in range(0, len(files), options.batch_size):
        captions += _captions(pipeline, pictures[start : start + options.batch_size], options, start)
    for path, caption in zip(files, captions, strict=True):
        print(f"{path}: {caption}")
    if output is not None:
        # The form that an imagefolder's metadata.jsonl has.
        pairs = zip(files, captions, strict=True)
        lines = [json.dumps({"file_name": str(path), "text": text}, ensure_ascii=False) for path, text in pairs]
        output.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{len(lines)} captions: {output}")
    return None


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line. Raises UserError."""
    parser = Options(__doc__)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="pictures")
    add("--model", required=True, help="a run of train_image_caption.py, a checkpoint, a pipeline folder, or a Hub id")
    add("--num_beams", type=int, default=1, help="1 takes the likeliest word each time; more is beam search")
    add("--top_p", type=float, help="draw words among the likeliest that together have this probability")
    add("--temperature", type=float, default=1.0, help="of the draws (default: 1)")
    add("--max_length", type=int, help="tokens at most (default: what the model was trained on)")
    add("--seed", type=int, default=0, help="of the first picture's draws; the next ones count up (default: 0)")
    add("--batch_size", type=int, default=16, help="pictures read at once; the captions do not depend on it")
    add("--device", help="cpu, cuda, mps, ... (default: the best there is)")
    add("--output", help="JSON lines to write: file_name and text")
    options = parser.parse(argv)
    for name in ("num_beams", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, but is {getattr(options, name)}")
    return options


def load_captioner(model: str, device: str | None) -> Any:
    """The pipeline, on `device` or the best there is.

    Raises:
        UserError: no such model, one that knows no captions of pictures, or no such device.
    """
    from pipelines.loading import find_pipeline, load_pipeline
    from pipelines.sample import best_device

    # Looked for before the slow imports, so that a mistyped path is told at once.
    folder = find_pipeline(model)
    pipeline = load_pipeline(folder)
    if type(pipeline).__name__ != "ImageCaptionPipeline":
        raise UserError(
            f"--model {model} is a {type(pipeline).__name__}, which captions no pictures; "
            "name a run of training/train_image_caption.py"
        )
    try:
        return pipeline.to(device or best_device())
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device that it has not
        raise UserError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error


def _captions(pipeline: Any, pictures: Sequence[Image], options: argparse.Namespace, first: int) -> list[str]:
    import torch

    generators = [torch.Generator().manual_seed(options.seed + first + i) for i in range(len(pictures))]
    try:
        return pipeline.caption(
            pictures,
            num_beams=options.num_beams,
            top_p=options.top_p,
            temperature=options.temperature,
            generator=generators,
            max_length=options.max_length,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def _open(path: Path) -> Image:
    from PIL import Image as PIL_Image

    try:
        picture = PIL_Image.open(path)
        picture.load()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; name pictures to caption") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} is no readable picture ({str(error).splitlines()[0]})") from None
    return picture


def _check_output(output: Path) -> None:
    """Found out before the model is loaded rather than after."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("ab"):
            pass
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    entry_point(main)
