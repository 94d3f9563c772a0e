"""Make posters, train on them, and generate new ones from prompts: about ten minutes on two CPU cores.

Every stage is a command of its own, which is printed. Run the quickstart again to resume it. The training measures how
fast this machine is before it begins, and trains fewer steps where the full recipe would take longer than --minutes.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipelines.tools.cli import UserError, entry_point
from pipelines.tools.commands import command as typed
from pipelines.tools.private import without_private
from pipelines.tools.resources import CODE, IS_CHECKOUT, shipped_path
from training.core.files import read_json_object, write_json
from training.core.made_folders import incomplete
from training.core.options import Options, option
from training.core.parsing import parse_config
from training.engine.signals import STARTED_BY
from training.engine.speed import SPEED_FILE

START = "make quickstart" if IS_CHECKOUT else typed("training/quickstart.py")
RUN, MODEL = Path("runs/quickstart"), "latent_diffusion"
CONFIG = "configs/experiments/latent_diffusion/quickstart.yaml"
DIFFUSION, EVALUATION = "train_latent_diffusion", "evaluate"
TITLES = {
    "make_posters": "drawing 2,000 posters with captions",
    "train_tokenizer": "building a tokenizer from the captions",
    DIFFUSION: "training a diffusion model, which turns captions into posters",
    EVALUATION: "generating posters for captions that were not trained on, and comparing them with real ones",
}
TINY = {
    "make_posters": "--num_posters 300",
    DIFFUSION: "--max_train_steps 30 --train_batch_size 16 --report_to none",
    EVALUATION: "--num_images 24 --num_inference_steps 5 --grid_rows 3 --extractor_resolution 64",
}
# What comes beside the training: starting two processes, and the evaluation, which takes this part of the time that is
# left to both (as long as about 700 of the 2,000 training steps of the full recipe).
STARTING_SECONDS, EVALUATION_SHARE = 15.0, 0.26
# What the full recipe reaches; see docs/LOG.md.
GOALS = {
    "background_color_share": (0.98, "posters with the background colour of their prompt"),
    "palette_share_ratio": (0.9, "pixels in the colours of the prompt, relative to real posters"),
    "title_position_share": (0.9, "posters with the title where the prompt puts it"),
    "picture_count_share": (0.7, "posters with the right number of pictures"),
}


@dataclass
class QuickstartConfig(Options):
    """Flags of quickstart.py."""

    minutes: float = option(10.0, at_least=2)
    """Time limit in minutes for the whole quickstart, at least 2; on a slow machine, fewer steps are trained"""
    tiny: bool = False
    """Run only a few steps of each stage, to check that it works; the posters will be shapeless"""


@dataclass
class Plan:
    """What was decided and done so far; kept in runs/quickstart/plan.json, so that nothing is decided twice."""

    minutes: float
    tiny: bool = False
    training_minutes: dict[str, float] = field(default_factory=dict)
    """Name of a training script → minutes that it was given."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Name of each script that is done → seconds that it took."""

    FILE = RUN / "plan.json"

    @classmethod
    def open(cls, minutes: float, tiny: bool) -> Plan:
        """Return the plan of the quickstart in this folder, or a new one.

        Raises:
            UserError: the quickstart in this folder is a tiny one and this one is not, or the other way round.
        """
        if not cls.FILE.is_file():
            return cls(minutes, tiny)
        try:
            plan = cls(**(read_json_object(cls.FILE) or {}))
            plan.minutes, plan.seconds = float(plan.minutes), {k: float(v) for k, v in plan.seconds.items()}
        except (TypeError, ValueError, AttributeError):
            raise UserError(f"{cls.FILE} is damaged; delete it, and the quickstart decides again") from None
        if "train_autoencoder" in plan.training_minutes:
            raise UserError(
                f"{RUN} was begun by an earlier version, which trained a U-Net with an autoencoder. Move it, for "
                f"example to {RUN}_unet, and start again; its model works there as before"
            )
        if plan.tiny != tiny:
            raise UserError(
                f"{RUN} belongs to a quickstart {'with' if plan.tiny else 'without'} --tiny, whose results would be "
                f"used; delete or move them first: rm -r {RUN} data/posters_64 data/posters_64_tokenizer"
            )
        if not plan.training_minutes:
            plan.minutes = minutes
        elif plan.minutes != minutes:
            print(
                f"{RUN} was begun with --minutes {plan.minutes:g}, which stays. For another number of minutes, delete "
                f"or move {RUN}, and start again"
            )
        return plan

    def save(self) -> None:
        RUN.mkdir(parents=True, exist_ok=True)
        write_json(self.FILE, asdict(self))

    def minutes_for(self, script: str) -> float:
        """Return the minutes that a training script may take; decided when it first starts."""
        if script not in self.training_minutes:
            remaining = 60 * self.minutes - sum(self.seconds.values()) - STARTING_SECONDS
            remaining *= 1 - EVALUATION_SHARE
            self.training_minutes[script] = round(max(remaining, 1) / 60, 2)
            self.save()
        return self.training_minutes[script]


def stages(tiny: bool) -> list[tuple[str, str | None]]:
    """Return (command, the path that exists once it is done) of every stage, in order."""
    recipes = yaml.safe_load(shipped_path(CONFIG).read_text(encoding="utf-8"))["prepare"]
    plan: list[tuple[str, str | None]] = [(command, path) for path, command in recipes.items()]
    plan += [
        (f"training/train_latent_diffusion.py --config {CONFIG}", None),
        (
            f"training/evaluate.py --model {RUN}/{MODEL} --dataset_name data/posters_64 --split test "
            "--guidance_scale 1.75 --num_inference_steps 20 --num_images 256 --max_real_images 512 "
            f"--extractor_resolution 128 --copy_spaces [pixels] --replay_images 50 --grid {RUN}/grid.png",
            None,
        ),
    ]
    return [(f"{command} {TINY.get(script_name(command), '')}".strip(), path) if tiny else (command, path)
            for command, path in plan]  # fmt: skip


def script_name(command: str) -> str:
    return Path(command.split()[0]).stem


def run_stage(command: str) -> float:
    """Run one of the project's scripts; return the seconds that it took. Raises UserError when it fails."""
    started = time.monotonic()
    script, *flags = shlex.split(command)
    environment = {**os.environ, STARTED_BY: str(os.getpid())}  # the script ends when the quickstart has been killed
    status = subprocess.run([sys.executable, str(CODE / script), *flags], env=environment).returncode
    if status:
        raise UserError(
            f"the quickstart stopped at: {command} (exit status {status}); the reason is above. "
            f"Run `{START}` again to resume there"
        )
    return time.monotonic() - started


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(QuickstartConfig, argv, description=__doc__)
    plan, commands = Plan.open(config.minutes, config.tiny), stages(config.tiny)
    print(
        f"The quickstart takes at most about {plan.minutes:g} minutes. The training measures the speed of this machine "
        "first, says how long the full recipe would take, and trains fewer steps where the time is too short for it.",
        flush=True,
    )
    for number, (command, done) in enumerate(commands, 1):
        script = script_name(command)
        if done and incomplete(done, command.split()[0]) is None:
            print(f"\n[{number}/{len(commands)}] {TITLES[script]}: already done ({done})", flush=True)
            continue
        if script == DIFFUSION:
            command += f" --max_train_minutes {plan.minutes_for(script):g}"
        print(f"\n[{number}/{len(commands)}] {TITLES[script]}\n      {typed(command)}", flush=True)
        seconds = run_stage(command)
        plan.seconds[script] = max(plan.seconds.get(script, 0.0), round(seconds, 1))
        plan.save()
    summary = summarize(plan)
    write_json(RUN / "summary.json", without_private(summary))
    _print_summary(summary)


def summarize(plan: Plan) -> dict[str, Any]:
    """Collect the metrics of all stages, and say which goals of the full recipe were reached."""
    diffusion = json.loads((RUN / MODEL / "record.json").read_text(encoding="utf-8"))
    evaluation = json.loads((RUN / MODEL / "evaluation.json").read_text(encoding="utf-8"))
    metrics = {**evaluation["metrics"], "diffusion_val_loss": diffusion["metrics"]["val_loss"]}
    recipe = full_recipe(plan)
    return {
        **metrics,
        "evaluation": {name: value for name, value in evaluation.items() if name != "metrics"},
        "diffusion_steps": diffusion["steps"],
        "cpu_cores": os.cpu_count(),
        "minutes": plan.minutes,
        "seconds": plan.seconds,
        "total_seconds": round(sum(plan.seconds.values()), 1),
        "goals": {name: _judge(name, metrics[name], recipe) for name in GOALS},
        "full_recipe": recipe,
    }


def full_recipe(plan: Plan) -> dict[str, Any]:
    """Say how much of the full recipe was trained, how long all of it takes here, and by which commands."""
    speed = read_json_object(RUN / MODEL / SPEED_FILE) or {}  # absent if the training was not fitted to a time
    rest = sum(seconds for script, seconds in plan.seconds.items() if script != DIFFUSION)
    seconds = rest + speed.get("all_steps_estimated_seconds", 0.0)
    minutes = round(seconds / 60 + 1)
    new = f"make quickstart MINUTES={minutes}" if IS_CHECKOUT else f"{START} --minutes {minutes}"
    longer = f"training/train_latent_diffusion.py --config {CONFIG}"
    return {
        "complete": speed.get("steps", 0) >= speed.get("all_steps", 0),
        "steps": speed.get("all_steps", 0),
        "estimated_minutes_here": minutes,
        "train_on": typed(longer),
        "from_the_beginning": f"rm -r {RUN} && {new}",
    }


def _judge(name: str, value: float, recipe: dict[str, Any]) -> dict[str, Any]:
    """Return whether a metric reaches its goal, and if this machine had too little time, the command that helps."""
    goal, _ = GOALS[name]
    verdict: dict[str, Any] = {"goal": goal, "reached": value >= goal}
    if value < goal and not recipe["complete"]:
        verdict["note"] = (
            f"this machine cannot train the full recipe in the given minutes; train on with: {recipe['train_on']}"
        )
    return verdict


def _print_summary(summary: dict[str, Any]) -> None:
    recipe = summary["full_recipe"]
    print(f"\nOn captions that were not trained on (all metrics: {RUN}/summary.json):")
    for name, (goal, words) in GOALS.items():
        real = summary.get("reader_" + name.removesuffix("_ratio") + "_real")
        reached = "reached" if summary["goals"][name]["reached"] else "not reached"
        print(f"  {summary[name]:6.3f}  {words}; goal {goal:g}, {reached}"
              + (f" (real posters: {real:.3f})" if real else ""))  # fmt: skip
    floor, kid = summary["evaluation"]["floor"]["kid"], summary["kid"]
    print(
        f"  {kid:6.3f}  KID of {summary['evaluation']['num_images']} posters, ± {summary['kid_standard_error']:.3f} "
        f"(real posters: {floor['mean']:.3f} ± {floor['std']:.3f}); lower is better\n"
        f"Copies: {summary['evaluation']['verdict']}"
    )
    if not recipe["complete"]:
        print(
            f"\nIn {summary['minutes']:g} minutes this machine trained {summary['diffusion_steps']} steps; the full "
            f"recipe has {recipe['steps']}, which takes about {recipe['estimated_minutes_here']} minutes here: "
            f"{recipe['from_the_beginning']}"
        )
    more = (
        f"pipelines/sample.py --model {RUN}/{MODEL} "
        '--prompt "a minimalist poster, blue on cream, one picture, title at the top" '
        "--guidance_scale 1.75 --output more.png"
    )
    steps = f" --max_train_steps {2 * summary['diffusion_steps']}" if recipe["complete"] else ""
    print(
        f"\nLook at the posters:  {RUN}/grid.png\n"
        + ("With .venv active (source .venv/bin/activate):\n" if IS_CHECKOUT else "")
        + f"Generate more:        {typed(more)}\n"
        f"Train on:             {recipe['train_on']}{steps}"
    )


if __name__ == "__main__":
    entry_point(main)
