"""Make posters, train on them, and generate new ones from prompts, in about ten minutes on two CPU cores.

Every stage is a command of its own, which is printed; the same command typed again goes on where it stood.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from pipelines.tools.cli import UserError, entry_point
from pipelines.tools.commands import command as typed
from pipelines.tools.resources import CODE, IS_CHECKOUT, shipped_path
from training.core.files import write_atomically
from training.core.options import Options
from training.core.parsing import parse_config

START = "make quickstart" if IS_CHECKOUT else typed("training/quickstart.py")
RUN = "runs/quickstart"
CONFIG = "configs/experiments/latent_diffusion/quickstart.yaml"
TITLES = {
    "make_posters.py": ("drawing 2,000 posters with captions", "10 seconds"),
    "train_tokenizer.py": ("learning the captions' words", "10 seconds"),
    "train_autoencoder.py": ("training an autoencoder: posters to latents and back", "3 minutes"),
    "precompute_latents.py": ("encoding the posters once", "15 seconds"),
}
TINY = {
    "make_posters.py": "--num_posters 300",
    "train_autoencoder.py": "--max_train_steps 30 --report_to none",
    "train_latent_diffusion.py": "--max_train_steps 30 --train_batch_size 16 --report_to none",
    "evaluate_posters.py": "--num_briefs 8 --num_inference_steps 5 --grid_rows 3",
}


@dataclass
class QuickstartConfig(Options):
    """Flags of quickstart.py."""

    tiny: bool = False
    """A few steps of everything, to see that it runs; the posters will be blobs"""


def stages(tiny: bool) -> list[tuple[str, str, str, str | None]]:
    """(what it does, how long it takes, command, the path that says it is done) of every stage, in order."""
    recipes = yaml.safe_load(shipped_path(CONFIG).read_text())["prepare"]
    found: list[tuple[str, str, str, str | None]] = []
    for path, command in recipes.items():
        title, duration = TITLES[Path(command.split()[0]).name]
        found.append((title, duration, command, path))
    found.append(
        ("training latent diffusion: captions to posters", "6 minutes",
         f"training/train_latent_diffusion.py --config {CONFIG}", None)
    )  # fmt: skip
    found.append(
        ("drawing 64 posters for captions never trained on, and measuring them", "30 seconds",
         f"training/evaluation/evaluate_posters.py --model {RUN}/latent_diffusion --dataset_name data/posters_64 "
         f"--guidance_scale 1.75 --grid {RUN}/grid.png --output {RUN}/figures.json", None)
    )  # fmt: skip
    if tiny:
        found = [(t, "seconds", f"{c} {TINY.get(Path(c.split()[0]).name, '')}".strip(), p) for t, _, c, p in found]
    return found


def run_stage(command: str) -> float:
    """Run one of the project's scripts; returns seconds. Raises UserError when it fails."""
    started = time.monotonic()
    script, *flags = shlex.split(command)
    status = subprocess.run([sys.executable, str(CODE / script), *flags]).returncode
    if status:
        raise UserError(
            f"the quickstart stopped at: {command} (exit status {status}); the reason is above. "
            f"`{START}` typed again goes on there"
        )
    return time.monotonic() - started


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(QuickstartConfig, argv, description=__doc__)
    plan, seconds = stages(config.tiny), {}
    for number, (title, duration, command, done) in enumerate(plan, 1):
        if done and Path(done).exists():
            print(f"\n[{number}/{len(plan)}] {title}: already done ({done})", flush=True)
            continue
        print(f"\n[{number}/{len(plan)}] {title} (about {duration})\n      {typed(command)}", flush=True)
        seconds[Path(command.split()[0]).stem] = round(run_stage(command), 1)
    summary = summarize(seconds)
    _say(summary)


def summarize(seconds: dict[str, float]) -> dict[str, float | int | dict]:
    """Collect the figures of all stages into runs/quickstart/summary.json."""
    run = Path(RUN)
    record = json.loads((run / "autoencoder/record.json").read_text())
    diffusion = json.loads((run / "latent_diffusion/record.json").read_text())
    summary = {
        **json.loads((run / "figures.json").read_text()),
        "autoencoder_psnr": record["metrics"]["val_psnr"],
        "autoencoder_ssim": record["metrics"]["val_ssim"],
        "diffusion_val_loss": diffusion["metrics"]["val_loss"],
        "autoencoder_steps": record["steps"],
        "diffusion_steps": diffusion["steps"],
        "cpu_cores": os.cpu_count(),
        "seconds": seconds,
        "total_seconds": round(sum(seconds.values()), 1),
    }
    write_atomically(run / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _say(summary: dict) -> None:
    asked = {
        "background_color_share": "posters with the background colour that was asked for",
        "palette_share_ratio": "pixels in the asked colours, relative to real posters",
        "title_position_share": "posters with the title where it was asked for",
        "picture_count_share": "posters with the right number of pictures",
    }
    print(f"\nOver held-out captions (all figures: {RUN}/summary.json):")
    for name, words in asked.items():
        real = summary.get("reader_" + name.removesuffix("_ratio") + "_real")
        print(f"  {summary[name]:.2f}  {words}" + (f" (the same reader on real posters: {real:.2f})" if real else ""))
    print(f"  {summary['autoencoder_psnr']:.1f}  dB, the autoencoder on held-out posters")
    more = (
        f"pipelines/sample.py --model {RUN}/latent_diffusion "
        '--prompt "a minimalist poster, blue on cream, one picture, title at the top" '
        "--guidance_scale 1.75 --output more.png"
    )
    steps = 2 * summary["diffusion_steps"]
    longer = f"training/train_latent_diffusion.py --config {CONFIG} --max_train_steps {steps}"
    print(
        f"\nLook at the posters:  {RUN}/grid.png\n"
        + ("With .venv active (source .venv/bin/activate):\n" if IS_CHECKOUT else "")
        + f"Draw more:            {typed(more)}\n"
        f"Go on training:       {typed(longer)}"
    )


if __name__ == "__main__":
    entry_point(main)
