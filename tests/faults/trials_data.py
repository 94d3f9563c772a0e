"""Trials of data: incomplete inputs, two makers, and files from others."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from tests.faults.compare import differences
from tests.faults.lab import (
    AUTOENCODER,
    DIFFUSION,
    LATENTS,
    POSTERS,
    TOKENIZER,
    Command,
    Done,
    Lab,
    Worker,
    runs,
)
from tests.faults.table import Row, Rows, expect, trial
from tests.faults.trials_runs import flip, fresh, half, write_bytes
from tests.support.runs import ROOT
from training.core.memory import peak_resident_bytes

CHECK = Command("", ROOT / "data_scripts/check_dataset.py", ("--train_data_dir", "images"))
TRAIN = AUTOENCODER.plus("--dataset_name", "", "--train_data_dir", "images", folder="trained")


def make_images(folder: Path, count: int, seed: int = 0, side: int = 64) -> Path:
    """Write a folder of images with captions."""
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (count, side, side, 3), dtype=np.uint8)
    lines = []
    for number in range(count):
        Image.fromarray(pixels[number]).save(folder / f"{number:05d}.png")
        lines.append(json.dumps({"file_name": f"{number:05d}.png", "text": f"number {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


_DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": lambda path: write_bytes(path, b""),
    "half there": half,
    "with another bit": flip,
}
_PARTS = (
    (TOKENIZER, ("tokenizer.json", "tokenizer_config.json")),
    (POSTERS, ("manifest.json", "data/train-00000-of-00001.parquet")),
    (LATENTS, ("cache.json", "train/shard-00001.json", "train/shard-00001.safetensors")),
)


@trial("Inputs that are not complete")
def incomplete_inputs(lab: Lab) -> Rows:
    """A damaged input is made again or refused; what is accepted gives the same result as the undamaged one."""
    lab.changes(DIFFUSION)
    for made, names in _PARTS:
        for command in (made, DIFFUSION):
            use = f"{made.script.name} typed again" if command is made else "training with it"
            row = Row(f"a file of {made.folder}/ is missing, empty, half there or has another bit; {use}")
            for name in names:
                for damaged, damage in _DAMAGES.items():
                    if damage is flip and (command is made or not name.endswith((".safetensors", ".parquet"))):
                        continue  # makers do not read their results again
                    with lab.worker() as worker, fresh(worker, DIFFUSION, lab) as folder:
                        damage(folder / made.folder / name)
                        done = worker.type(command, folder)
                        problems = expect(done, [0, 2])
                        if done.status == 0:
                            problems += differences(folder / command.folder, lab.reference / command.folder)
                        row.record(done, [f"{name} {damaged}: {problem}" for problem in problems])
            yield row


def _two_at_once(worker: Worker, command: Command, folder: Path) -> list[Done]:
    processes = [
        subprocess.Popen(
            [sys.executable, str(command.script), *command.words], cwd=folder, env=worker.variables,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in processes]
    return [Done(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


@trial("Two makers of one folder")
def two_makers(lab: Lab) -> Rows:
    for command in (POSTERS, TOKENIZER, LATENTS):
        lab.changes(command)
        row = Row(f"two processes of {command.script.name} for one folder")
        for _ in range(8 if lab.thorough else 1):
            with lab.worker() as worker, fresh(worker, command, lab) as folder:
                both = _two_at_once(worker, command, folder)
                problems = [line for done in both for line in expect(done, [0, 2])]
                problems += [] if 0 in [done.status for done in both] else ["neither has made it"]
                problems += differences(folder / command.folder, lab.reference / command.folder)
                row.record(max(both, key=lambda done: done.status or 0), problems)
        yield row


@trial("Inputs that a run makes (`prepare`)")
def prepared_inputs(lab: Lab) -> Rows:
    row = Row("an entry of `prepare` that cannot be read as a command")
    for command in ('data_scripts/make_posters.py --output_dir "made', "", "rm -rf made", "data_scripts/../x.py"):
        with lab.worker() as worker, fresh(worker, POSTERS, lab) as folder:
            (folder / "shared.yaml").write_text(json.dumps({"prepare": {"made": command}, "dataset_name": "made"}))
            done = worker.type(AUTOENCODER.plus("--config", "shared.yaml", "--dataset_name", "made"), folder)
            row.record(done, [f"{command!r}: {line}" for line in expect(done, [2], ["prepare"])])
    yield row
    row = Row("a trainer that is killed while a command of `prepare` makes its input: both end")
    with lab.worker() as worker, fresh(worker, POSTERS, lab) as folder:
        maker = "data_scripts/make_posters.py --output_dir made --num_posters 100000"
        (folder / "shared.yaml").write_text(json.dumps({"prepare": {"made": maker}, "dataset_name": "made"}))
        trainer = worker.start(AUTOENCODER.plus("--config", "shared.yaml", "--dataset_name", "made"), folder, cold=True)
        while runs(trainer) and not psutil.Process(trainer).children(recursive=True):
            time.sleep(0.05)
        time.sleep(5)
        made = psutil.Process(trainer).children(recursive=True)
        os.kill(trainer, signal.SIGKILL)
        done = worker.end()
        _, alive = psutil.wait_procs(made, timeout=10)
        problems = [f"still alive after 10 s: {' '.join(process.cmdline()[-8:])}" for process in alive]
        for process in alive:
            process.kill()
        yield row.record(done, problems if made else ["nothing was being made"])


@trial("A bad row that only one process sees")
def bad_row_in_one_rank(lab: Lab) -> Rows:
    lab.changes(LATENTS)
    row = Row("a broken image in the share of the second of two processes of precompute_latents.py")
    with lab.worker() as worker, fresh(worker, LATENTS, lab) as folder:
        images = make_images(folder / "images", 8)
        (images / "00006.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        words = ("--train_data_dir", "images", "--resolution", "64", "--vae", "vae", "--shard_rows", "4")
        process = subprocess.run(
            [*launcher, str(LATENTS.script), *words, "--splits", "[train]", "--output_dir", "cached"], cwd=folder,
            env=worker.variables, capture_output=True, text=True,
        )  # fmt: skip
        done = Done(process.returncode, process.stdout + process.stderr)
        yield row.record(done, expect(done, [1, 2], ["00006.png"], never=["gloo", "Broken pipe"]))


def _png_bomb(path: Path, side: int) -> None:
    """Write a black image of one bit a pixel: half a megabyte that decodes to `side`² bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packed, row = zlib.compressobj(1), bytes(1 + (side + 7) // 8)
    data = b"".join(packed.compress(row * 1000) for _ in range(side // 1000)) + packed.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def _measured(worker: Worker, command: Command, folder: Path, **environment: str) -> tuple[Done, float]:
    """Run a command in a new interpreter; return it and the most memory that it used, in GiB."""
    output = folder / "output.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(command.script), *command.words], cwd=folder, env=worker.variables | environment,
            stdout=file, stderr=file,
        )  # fmt: skip
    peak = 0
    while process.poll() is None:  # the peak only rises, and at the end it is no longer known
        peak = peak_resident_bytes(process.pid) or peak
        time.sleep(0.01)
    return Done(process.returncode, output.read_text(errors="replace")), peak / 2**30


@trial("Image files from others")
def images_from_others(lab: Lab) -> Rows:
    lab.changes(AUTOENCODER)
    eps = Row("an EPS file named .png: Ghostscript is not started")
    bomb = Row("a PNG file of half a megabyte that decodes to 4 GB")
    for command in (TRAIN, CHECK):
        with lab.worker() as worker, fresh(worker, POSTERS, lab) as folder:
            images, programs = make_images(folder / "images", 12), folder / "bin"
            (images / "00003.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n")
            programs.mkdir()
            ghostscript = programs / "gs"
            ghostscript.write_text(f"#!/bin/sh\ntouch {folder}/started\necho 10.0\n")
            ghostscript.chmod(0o755)
            done = worker.type(command, folder, PATH=f"{programs}:{os.environ['PATH']}")
            problems = expect(done, [2], ["00003.png"])
            eps.record(done, [*problems, "gs was started"] if (folder / "started").exists() else problems)
        with lab.worker() as worker, fresh(worker, POSTERS, lab) as folder:
            images = make_images(folder / "images", 12)
            for number in (3, 5):
                _png_bomb(images / f"{number:05d}.png", 64_000)
            done, gigabytes = _measured(worker, command, folder)
            problems = expect(done, [2], ["00005.png", "pixels"])
            bomb.record(done, problems + ([f"it took {gigabytes:.1f} GiB"] if gigabytes > 1.5 else []))
    yield eps
    yield bomb


@trial("Paths in a Parquet file")
def parquet_paths(lab: Lab) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = Row("a Parquet file whose images are paths of this machine")
    with lab.worker() as worker, fresh(worker, POSTERS, lab) as folder:
        private = make_images(folder / "private", 12)
        cells = [{"bytes": None, "path": str(private / f"{number:05d}.png")} for number in range(12)]
        (folder / "images").mkdir()
        images = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        table = pa.table({"image": images, "text": [f"number {number}" for number in range(12)]})
        features = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
        metadata = json.dumps({"info": {"features": features}})
        pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), folder / "images/train.parquet")
        done = worker.type(AUTOENCODER.plus("--dataset_name", "images", folder="trained"), folder)
        yield row.record(done, expect(done, [2], ["not read"]))


@trial("Hostile captions")
def hostile_captions(lab: Lab) -> Rows:
    row = Row("captions with NUL, ESC and bidirectional controls, and of 3 MB")
    hostile = ["a\x00b", "\x1b[2J\x1b[31mred", "abc \u202e def", "a" * 3_000_000]
    for caption in hostile:
        for script in ("check_dataset", "train_tokenizer"):
            with lab.worker() as worker, fresh(worker, POSTERS, lab) as folder:
                images = make_images(folder / "images", 12)
                lines = (images / "metadata.jsonl").read_text().splitlines()
                lines[0] = json.dumps({"file_name": "00000.png", "text": caption})
                (images / "metadata.jsonl").write_text("\n".join(lines))
                words = ("--train_data_dir", "images") + (
                    ("--output_dir", "tok", "--model", "bpe") if script == "train_tokenizer" else ()
                )
                began = time.monotonic()
                done = worker.type(Command("", ROOT / f"data_scripts/{script}.py", words), folder)
                took = time.monotonic() - began
                problems = expect(done, [0, 2], never=["Traceback", "\x00", "\x1b[2J", "\u202e", "a" * 10_000])
                row.record(done, problems + ([f"it took {took:.0f} s"] if took > 30 else []))
    yield row


@trial("Other images, the same number")
def swapped_images(lab: Lab) -> Rows:
    row = Row("other images with the same number of rows")
    lab.changes(POSTERS)
    with lab.worker() as worker, fresh(worker, POSTERS, lab) as folder:
        make_images(folder / "images", 12)
        assert worker.type(TRAIN, folder).status == 0
        shutil.rmtree(folder / "images")
        make_images(folder / "images", 12, seed=1)
        done = worker.type(TRAIN.plus("--num_train_epochs", "3"), folder)
        yield row.record(done, expect(done, [2], ["data"]))
    row = Row("the same images at another path")
    for other in ("moved", "images/", "./images"):
        with lab.worker() as worker, fresh(worker, POSTERS, lab) as folder:
            make_images(folder / "images", 12)
            assert worker.type(TRAIN, folder).status == 0
            if other == "moved":
                (folder / "images").rename(folder / "moved")
            done = worker.type(TRAIN.plus("--train_data_dir", other, "--num_train_epochs", "3"), folder)
            row.record(done, [f"{other}: {problem}" for problem in expect(done, [0])], lost=0)
    yield row


@trial("The start of a run on many images", mark="long")
def slow_start(lab: Lab) -> Rows:
    row = Row("40,000 images: the second start takes at most 3 s longer than with 12 images")
    lab.changes(POSTERS)
    seconds = {}
    for count in (12, 40_000):
        with lab.worker() as worker, fresh(worker, POSTERS, lab) as folder:
            make_images(folder / "images", count, side=16)
            short = TRAIN.plus("--validation_fraction", "0.0005" if count > 12 else "0.1")
            first = worker.type(short.plus("--max_train_steps", "1"), folder)
            assert first.status == 0, first.output
            began = time.monotonic()
            done = worker.type(short.plus("--max_train_steps", "2"), folder)
            seconds[count] = time.monotonic() - began
    late = seconds[40_000] > seconds[12] + 3
    problems = [f"it took {seconds[40_000]:.1f} s, and {seconds[12]:.1f} s with 12 images"] if late else []
    yield row.record(done, expect(done, [0]) + problems)
