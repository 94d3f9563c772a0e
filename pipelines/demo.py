"""Open trained models in a browser: the studio.

    python pipelines/demo.py --model runs/my_images/latent_diffusion_64_caption
    python pipelines/demo.py --model runs/posters/decoder_64 runs/image_caption/emoji_64 --runs runs
    python pipelines/demo.py --model runs/my_images/latent_diffusion_64_caption --from_png image.png

The page has the tabs that suit each model: generating from text, class labels or design briefs, changing and filling
images, drawing controls, captioning, and analysing posters. --runs adds a browser of training runs, which follows runs
that are training. Only this machine can open the page unless --host names another address, and it asks for no password.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.tools.cli import Options, UserError, entry_point
from pipelines.tools.commands import install_command
from pipelines.tools.devices import DEVICE_HELP

LOCAL = ("127.0.0.1", "localhost", "::1")
PORT = 7860
DTYPES = ("float32", "float16", "bfloat16")


def main(argv: Sequence[str] | None = None) -> int | None:
    options = parse_arguments(argv)
    runs = Path(options.runs).expanduser() if options.runs else None
    if runs is not None and not runs.is_dir():
        raise UserError(f"--runs {options.runs} is not a folder; give the folder that contains the run folders")
    recipe = None
    if options.from_png:
        from pipelines.tools.repeating import read_recipe

        recipe = read_recipe(options.from_png)
    _check_gradio()
    with tempfile.TemporaryDirectory(prefix="halftone-studio-") as folder:
        # Gradio reads these when it is imported: what is uploaded is deleted with the folder, and nothing is reported.
        os.environ |= {"GRADIO_TEMP_DIR": f"{folder}/gradio", "GRADIO_ANALYTICS_ENABLED": "False"}
        _serve(options, runs, recipe, Path(folder))
    return None


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Raises UserError."""
    parser = Options(__doc__)
    add = parser.add_argument
    add("--model", nargs="+", action="extend", default=[], help="Pipeline folders, runs, checkpoints or Hub ids")
    add("--runs", help="Folder of training runs to browse, such as runs")
    add("--from_png", help="PNG file of sample.py or of the studio, whose settings are set when the page opens")
    add("--host", default=LOCAL[0], help=f"Address to listen on; 0.0.0.0 is every network (default: {LOCAL[0]})")
    add("--port", type=int, default=PORT, help=f"Port to listen on; 0 takes a free one (default: {PORT})")
    add("--dtype", choices=DTYPES, default="float32", help="Data type of the weights (default: float32)")
    add("--device", help=DEVICE_HELP)
    add("--trust_remote_code", action="store_true", help="Run custom code that a model contains")
    options = parser.parse(argv)
    if not options.model and not options.runs:
        raise UserError("the studio needs something to show; add --model, --runs, or both")
    if not 0 <= options.port <= 65535:
        raise UserError(f"--port must be from 0 to 65535, but is {options.port}")
    if options.from_png and not options.model:
        raise UserError("--from_png has no effect without --model; add the model that generated the image")
    return options


def _check_gradio() -> None:
    import importlib.util

    if importlib.util.find_spec("gradio") is None:
        raise UserError(f"the studio needs Gradio, which is not installed; run `{install_command('demo', 'gradio')}`")


def _serve(options: argparse.Namespace, runs: Path | None, recipe: Any, folder: Path) -> None:
    """Load the models, open the page, and wait until the process is asked to stop. Raises UserError."""
    import torch

    from pipelines.studio.app import CSS, FONTS, MUTED, NAMES, Studio
    from pipelines.studio.bounds import UPLOAD_MB, forbid_rare_formats
    from pipelines.studio.models import load_models

    forbid_rare_formats()
    models = load_models(
        options.model, options.device, dtype=getattr(torch, options.dtype), trust_remote_code=options.trust_remote_code
    )
    page = Studio(models, runs, folder, recipe).build()
    import gradio as gr

    theme = gr.themes.Base(**FONTS).set(**MUTED)
    try:
        _, address, _ = page.launch(
            server_name=options.host, server_port=options.port or _free_port(options.host), share=False, quiet=True,
            prevent_thread_lock=True, max_file_size=f"{UPLOAD_MB}mb", theme=theme, css=CSS, js=NAMES,
            footer_links=[], ssr_mode=False, favicon_path=None,
            # Gradio would ask its own page for an answer, and give up after three seconds on a busy machine.
            _frontend=False,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"--port {options.port} on {options.host} cannot be used ({error}); choose another") from error
    print(f"The studio is open at {address} (Ctrl-C closes it).", flush=True)
    if options.host not in LOCAL:
        print("Everybody who can reach this machine can use it, because it asks for no password.", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def _free_port(host: str) -> int:
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    entry_point(main)
