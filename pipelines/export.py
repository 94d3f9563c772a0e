"""Export a trained model to ONNX, so that it runs without PyTorch:

    python pipelines/export.py --model runs/quickstart/latent_diffusion --format onnx --output exported
    python pipelines/export.py --model runs/posters/decoder_64 --format onnx --output exported --dtype fp16
    python pipelines/export.py --model runs/quickstart/latent_diffusion --output exported --benchmark true

Every network of the model becomes a graph of its own, is run with ONNX Runtime, and is compared with PyTorch. A larger
difference than --tolerance is an error, and then nothing is written. The folder of a latent diffusion model also
contains onnx_latent_diffusion.py, which generates images with NumPy, tokenizers, ONNX Runtime and Pillow alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.tools.cli import Options, UserError, entry_point
from pipelines.tools.commands import install_command
from pipelines.tools.files import check_output_folder
from pipelines.tools.replacing import WRITING

if TYPE_CHECKING:
    from pipelines.tools.onnx_parts import Part

FORMATS = ("onnx",)
DTYPES = {"fp32": "float32", "float32": "float32", "fp16": "float16", "float16": "float16"}
TOLERANCES = {"float32": 1e-3, "float16": 0.05}
LEAST_OPSET, OPSET, LARGEST_OPSET = 18, 20, 23
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
BENCHMARK_STEPS = 10


def main(argv: Sequence[str] | None = None) -> int | None:
    options = parse_arguments(argv)
    output = Path(os.path.abspath(Path(options.output).expanduser()))
    _check_packages()
    _check_output(output)
    pipeline, reference = _load(options)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=WRITING, dir=output.parent) as temporary:
            folder = Path(temporary) / output.name
            folder.mkdir()
            export(pipeline, reference, folder, options)
            if output.is_dir():
                output.rmdir()  # it is empty
            os.replace(folder, output)
    except OSError as error:
        raise UserError(f"--output {options.output} cannot be written ({error}); choose another folder") from error
    print(f"exported: {options.output}")
    if options.benchmark == "true":
        benchmark(reference, output)
    return None


def export(pipeline: Any, reference: Any, folder: Path, options: argparse.Namespace) -> None:
    """Write the parts of a pipeline and their description into `folder`, and compare each with PyTorch.

    Args:
        pipeline: with the weights to export.
        reference: the same pipeline in float32.

    Raises:
        UserError: a part cannot be exported, or differs from PyTorch by more than the tolerance.
    """
    from pipelines.tools.onnx_folder import write_description
    from pipelines.tools.onnx_parts import parts_of

    parts, expected = parts_of(pipeline), parts_of(reference)
    if not parts:
        raise UserError(f"--model {options.model} is a {type(pipeline).__name__}, of which no part can be exported")
    print(f"{'part':<20}{'size':<10}{'largest difference':>20}")
    entries = {}
    for part, its in zip(parts, expected, strict=True):
        entries[part.name] = _export_part(part, its, folder, options)
    settings = {"format": options.format, "opset": options.opset, "dtype": options.dtype}
    write_description(reference, folder, entries, settings)


def _export_part(part: Part, reference: Part, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Export one part, print its largest difference, and return its entry in the description."""
    from pipelines.tools.onnx_graphs import largest_difference, open_graph, write_graph

    path = folder / f"{part.name}.onnx"
    varying = write_graph(part, path, options.opset)
    session = open_graph(path)
    difference = largest_difference(reference, session, varying)
    size = "any" if varying else "as trained" if part.axes else ""
    print(f"{part.name:<20}{size:<10}{difference:>20.1e}", flush=True)
    if not difference <= options.tolerance:  # also if it is not a number
        raise UserError(
            f"part '{part.name}' differs from PyTorch by {difference:.2g}, and --tolerance is {options.tolerance:g}; "
            "nothing was written; use --dtype fp32, another --opset, or a larger --tolerance"
        )
    inputs = {one.name: {"shape": one.shape, "type": one.type} for one in session.get_inputs()}
    return {
        "file": path.name,
        "inputs": inputs,
        "outputs": list(part.outputs),
        "dynamic_size": varying,
        "largest_difference": difference,
    }


def benchmark(pipeline: Any, folder: Path) -> None:
    """Print the latency of PyTorch and of ONNX Runtime on the CPU, for each part and for a whole image."""
    import torch

    from pipelines.common.distilled import sampling_defaults
    from pipelines.tools.onnx_folder import generates_from_latents
    from pipelines.tools.onnx_graphs import alternating, latencies, open_graph
    from pipelines.tools.onnx_latent_diffusion import OnnxLatentDiffusionPipeline
    from pipelines.tools.onnx_parts import parts_of

    threads = torch.get_num_threads()
    print(f"\nCPU latency in ms, batch of 1, float32 in PyTorch, {threads} threads each")
    print(f"{'part':<20}{'PyTorch':>12}{'ONNX Runtime':>14}{'ratio':>8}")

    def show(name: str, seconds: tuple[float, float]) -> None:
        print(
            f"{name:<20}{seconds[0] * 1e3:>12.1f}{seconds[1] * 1e3:>14.1f}{seconds[1] / seconds[0]:>8.2f}", flush=True
        )

    for part in parts_of(pipeline):
        show(part.name, latencies(part, open_graph(folder / f"{part.name}.onnx", threads)))
    if not generates_from_latents(pipeline):
        return
    exported = OnnxLatentDiffusionPipeline(folder, num_threads=threads)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.set_scheduler(exported.config["scheduler"]["name"])
    steps = min(BENCHMARK_STEPS, sampling_defaults(pipeline).num_inference_steps)
    arguments: dict[str, Any] = {"num_inference_steps": steps, "generator": 0, "output_type": "np"}
    arguments |= {"prompt": "a red circle"} if exported.config["takes_text"] else {}
    images = [pipeline(**arguments).images, exported(**arguments)]
    show(f"image, {steps} steps", alternating(lambda: pipeline(**arguments), lambda: exported(**arguments)))
    print(f"mean difference of the images: {abs(images[0] - images[1]).mean() * 255:.3f} of 255 grey levels")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Raises UserError."""
    parser = Options(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="Run folder, checkpoint, pipeline folder or Hub id of a model")
    add("--checkpoint", help="Checkpoint of a run: best, latest or a folder name (default: the final pipeline)")
    add("--format", choices=FORMATS, default=FORMATS[0], help="Format of the exported model (default: onnx)")
    add("--output", required=True, help="Folder to write; it must not exist, or be empty")
    add("--dtype", choices=tuple(DTYPES), default="fp32", help="Data type of the weights (default: fp32)")
    add(
        "--opset",
        type=int,
        default=OPSET,
        help=f"Version of ONNX's operators, {LEAST_OPSET} to {LARGEST_OPSET} (default: {OPSET})",
    )
    add(
        "--tolerance",
        type=float,
        help="Largest absolute difference of an output from PyTorch in float32 (default: 1e-3, and 0.05 with fp16)",
    )
    add(
        "--benchmark",
        choices=("true", "false"),
        default="false",
        help="Print the latency of PyTorch and ONNX Runtime on the CPU (default: false)",
    )
    options = parser.parse(argv)
    options.dtype = DTYPES[options.dtype]
    if not LEAST_OPSET <= options.opset <= LARGEST_OPSET:
        raise UserError(
            f"--opset must be from {LEAST_OPSET} to {LARGEST_OPSET}, but is {options.opset}; PyTorch's exporter makes "
            f"no older graphs, and ONNX Runtime runs no newer ones; leave it out for {OPSET}"
        )
    if options.tolerance is None:
        options.tolerance = TOLERANCES[options.dtype]
    if not options.tolerance > 0:
        raise UserError(f"--tolerance must be above 0, but is {options.tolerance:g}")
    return options


def _check_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        install = install_command("export", " ".join(PACKAGES))
        raise UserError(f"exporting needs {missing[0]}, which is not installed; run `{install}`")


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} already exists and is not an empty folder; choose another folder")
    check_output_folder(output)


def _load(options: argparse.Namespace) -> tuple[Any, Any]:
    """Return the pipeline with the weights to export, and the one in float32 to compare them with."""
    from pipelines.tools.loading import find_pipeline, load_pipeline

    folder = find_pipeline(options.model, options.checkpoint)
    reference = load_pipeline(folder)
    if options.dtype == "float32":
        return reference, reference
    import torch

    pipeline = load_pipeline(folder, dtype=torch.float16)
    vae = getattr(pipeline, "vae", None)
    if vae is not None and vae.config.get("force_upcast"):  # such autoencoders overflow in half precision
        vae.float()
    return pipeline, reference


if __name__ == "__main__":
    entry_point(main)
