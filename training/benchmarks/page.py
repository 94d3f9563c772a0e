"""The page of the results, docs/benchmarks.md, and the JSON file beside it from which it is written.

The JSON file has the results of every machine on which the benchmark was run. A run replaces those parts of its own
machine that it measured, and keeps all others.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.tools.cli import UserError
from training.benchmarks.inputs import PARTS
from training.benchmarks.machine import details, title
from training.benchmarks.results import (
    FIRST_STEP,
    FOLDER_SPEED,
    HOST_TIME,
    LATENTS_TIME,
    LOOP_RATIO,
    LOOP_SPEED,
    SAMPLING_TIME,
    STEP_MEMORY,
    Metric,
    short,
)
from training.core.files import write_atomically, write_json

HEAD = """# Benchmarks

`make bench` measures what Halftone costs and writes this page. Run it on your machine, and a row is added to the
table. Two sides of a comparison take turns, so that other work on the machine disturbs both of them; a ratio is
the median over these turns. The quartiles say how far repeated measurements are apart. Memory is the peak of resident
memory of a process, in MB (10⁶ bytes). What a model learns in how many minutes is measured in
[recipes.md](recipes.md).

"""
SUMMARY_HEAD = """## Time and memory on common devices

All columns belong to the quickstart's network for 64 px, in float32.

"""
SUMMARY = {
    "training, images/s": LOOP_SPEED,
    "speed over a bare loop": LOOP_RATIO,
    "CPU time beside the network, ms/step": HOST_TIME,
    "memory of training, MB": STEP_MEMORY.format("latent diffusion"),
    "sampling (euler, 25 steps), s/image": SAMPLING_TIME,
    "start to first step, s": FIRST_STEP,
    "JPEG folder, images/s": FOLDER_SPEED,
    "1,024 latents, ms": LATENTS_TIME,
}
"""Columns of the table of machines, and the metrics that they show."""
TITLES = {
    "loop": "The training loop",
    "latents": "Cached latents",
    "pipeline": "The pipeline against a plain loop of Diffusers",
    "sampling": "Samplers",
    "memory": "Memory",
    "start": "Start-up",
    "loading": "Data loading alone",
    "accelerator": "A large U-Net on a GPU",
    "posters": "Drawing posters",
    "decoder": "The poster decoder",
    "captions": "Captions",
    "scale": "Large data",
}
NOTES = {
    "loop": "The loop with everything on (EMA at every fourth step, as in the quickstart, metrics, progress bar, "
    "captions) and a bare PyTorch loop train the same networks on the same latents in batches of 32. The CPU time "
    "beside the network is measured with a tiny network and one thread, as the difference of both loops.",
    "latents": "Both kinds of steps, with batches of 32, include the loading of their batch, the optimizer and the EMA "
    "weights. Latents are 16×8×8. One core assembles their batches, whose time is CPU time.",
    "pipeline": "Both sides use the same U-Net, text encoder, autoencoder, noise, scheduler and guidance, and their "
    "images agree.",
    "sampling": "Batches of four images of 64 px with guidance 2.5. heun calls the network twice in a step. The "
    "quartiles of a KID are its value with its standard error taken off and added.",
    "memory": "Three training steps with batches of 16 in float32, including imports, gradients, optimizer and EMA "
    "weights; networks of the quickstart and of the small presets.",
    "start": "Medians of whole commands. CPU time is that of the command and of the processes that it starts.",
    "loading": "JPEG files of 512×512 pixels, resized to 64 px, in batches of 16; one thread in each process.",
    "accelerator": "Latents of 16×32×32 in batches of 64, bfloat16. The bare loop is compiled where the loop is; it "
    "has no EMA weights and writes nothing. The operations of a step are those of the networks' forward and backward "
    "passes.",
    "scale": "Runs of a tiny U-Net. Latents are 4×4×4 in float16, with captions and 100 classes, 512 in a shard; both "
    "caches take turns. Peak memory is that of the largest process of a run. Image files have 32×32 pixels and are in "
    "100 folders; a second start has another output folder, and finds in the cache of `datasets` what the first start "
    "recorded about the files.",
}


def update_page(page: Path, machine: Mapping[str, Any], measured: Mapping[str, Sequence[Metric]]) -> None:
    """Add the results of a run to the JSON file beside the page, and write the page from it."""
    file = page.with_suffix(".json")
    machines = read_machines(file)
    own = next((one for one in machines if title(one["machine"]) == title(dict(machine))), None)
    if own is None:
        own = {"machine": {}, "parts": {}}
        machines.append(own)
    own["machine"] = dict(machine)
    for part, metrics in measured.items():
        own["parts"][part] = [asdict(metric) for metric in metrics]
    page.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"machines": machines})
    write_atomically(page, page_text(machines))


def read_machines(file: Path) -> list[dict[str, Any]]:
    """Return what was measured on each machine; an empty list if nothing was measured yet.

    Raises:
        UserError: the file is damaged.
    """
    if not file.is_file():
        return []
    try:
        machines = json.loads(file.read_text(encoding="utf-8"))["machines"]
        page_text(machines)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} is damaged; restore it with git, or delete it to begin with an empty page") from None
    return machines


def page_text(machines: Sequence[Mapping[str, Any]]) -> str:
    """Return the Markdown of the page: the table of machines, then a section for each of them."""
    table = summary_table(machines) if machines else "Nothing has been measured yet.\n"
    return HEAD + SUMMARY_HEAD + table + "".join(map(_section, machines))


def summary_table(machines: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of machines, without those that measured none of its columns; other missing values are empty."""
    lines = [["machine", *SUMMARY], ["---", *["---:"] * len(SUMMARY)]]
    for one in machines:
        known = {metric["name"]: metric["value"] for metrics in one["parts"].values() for metric in metrics}
        cells = ["" if name not in known else short(known[name]) for name in SUMMARY.values()]
        if any(cells):
            lines.append([title(one["machine"]), *cells])
    return _table(lines)


def _section(one: Mapping[str, Any]) -> str:
    parts = [(part, one["parts"][part]) for part in PARTS if part in one["parts"]]
    text = f"\n## {title(one['machine'])}\n\n{_wrapped(details(one['machine']))}\n"
    for part, metrics in parts:
        note = f"{_wrapped(NOTES[part])}\n\n" if part in NOTES else ""
        text += f"\n### {TITLES[part]}\n\n{note}{metrics_table([Metric(**metric) for metric in metrics])}"
    return text


def metrics_table(metrics: Sequence[Metric]) -> str:
    """Return the table of one part; the columns of the goals are left out where there are none."""
    with_goals = any(metric.goal is not None for metric in metrics)
    header = ["", "median", "quartiles", "unit", *(["goal", ""] if with_goals else [])]
    lines = [header, ["---", "---:", "---:", "---", *(["---:", "---"] if with_goals else [])]]
    for metric in metrics:
        spread = "" if metric.low is None or metric.high is None else f"{short(metric.low)} to {short(metric.high)}"
        goal = [metric.goal_text, metric.verdict] if with_goals else []
        lines.append([metric.name, short(metric.value), spread, metric.unit, *goal])
    return _table(lines)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
