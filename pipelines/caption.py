"""Caption pictures with a model of pictures and captions:

    python pipelines/caption.py photo.jpg drawing.png --model runs/image_caption/emoji_64
    python pipelines/caption.py *.png --model runs/image_caption/emoji_64 --num_beams 4 --output captions.jsonl

One line for each picture; pictures may have any size. --top_p draws captions instead of taking the likeliest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.tools.cli import Options, UserError, entry_point
from pipelines.tools.devices import DEVICE_HELP
from pipelines.tools.files import check_image_header, check_output, read_image

if TYPE_CHECKING:
    from PIL.Image import Image


def main(argv: Sequence[str] | None = None) -> int | None:
    options = parse_arguments(argv)
    files = [Path(name).expanduser() for name in options.files]
    for path in files:
        check_image_header(path)
    output = Path(options.output).expanduser() if options.output else None
    if output is not None:
        _check_output(output, options.overwrite)
    pipeline = load_captioner(options.model, options.device)
    # What is done is printed and written at once: a picture that cannot be decoded must not cost the others.
    with output.open("w", encoding="utf-8") if output else contextlib.nullcontext() as lines:
        for start in range(0, len(files), options.batch_size):
            paths = files[start : start + options.batch_size]
            captions = _captions(pipeline, [read_image(path) for path in paths], options, start)
            for path, caption in zip(paths, captions, strict=True):
                print(f"{path}: {caption}", flush=True)
                if output and lines:
                    # The form of an imagefolder's metadata.jsonl, where names are relative to its folder.
                    record = {"file_name": _relative(path, output.parent), "text": caption}
                    print(json.dumps(record, ensure_ascii=False), file=lines, flush=True)
    if output:
        print(f"{len(files)} captions: {output}")
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
    add("--num_candidates", type=int, default=1, help="draw so many captions and take the one most like all of them")
    add("--max_length", type=int, help="tokens at most (default: what the model was trained on)")
    add("--seed", type=int, default=0, help="of the first picture's draws; the next ones count up (default: 0)")
    add("--batch_size", type=int, default=16, help="pictures read at once; the captions do not depend on it")
    add("--device", help=DEVICE_HELP)
    add("--output", help="JSON lines to write: file_name and text")
    add("--overwrite", action="store_true", help="replace the file of --output")
    options = parser.parse(argv)
    for name in ("num_beams", "batch_size", "num_candidates"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, but is {getattr(options, name)}")
    return options


def load_captioner(model: str, device: str | None) -> Any:
    """The pipeline, on the device that `--device` names (see `get_device`).

    Raises:
        UserError: no such model, one that knows no captions of pictures, or no such device.
    """
    from pipelines.tools.loading import load_on_device

    pipeline = load_on_device(model, device)
    if type(pipeline).__name__ != "ImageCaptionPipeline":
        raise UserError(
            f"--model {model} is a {type(pipeline).__name__}, which captions no pictures; "
            "name a run of training/train_image_caption.py"
        )
    return pipeline


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
            num_candidates=options.num_candidates,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def _relative(path: Path, folder: Path) -> str:
    """The path as seen from `folder`, with forward slashes."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on another drive
        return path.resolve().as_posix()


def _check_output(output: Path, overwrite: bool) -> None:
    if output.is_file() and output.stat().st_size and not overwrite:
        raise UserError(f"--output {output} is there already; name another file, or replace it: --overwrite")
    check_output(output)


if __name__ == "__main__":
    entry_point(main)
