"""Checks of the machine: device, precision, cores, memory, disks, fonts, and the programs that some features need."""

from __future__ import annotations

import math
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipelines.tools.cli import one_line
from training.data.emoji_font import HOW_TO_INSTALL, system_emoji_font
from training.diagnostics.cgroups import cpu_limit, memory_limit
from training.diagnostics.finding import Finding, shown

GIB = 2**30
LEAST_MEMORY_GIB = 4.0
LEAST_SHARED_MEMORY_GIB = 1.0
LEAST_FREE_GPU_SHARE = 0.5
# The quickstart with its environment takes about 3 GiB, and a checkpoint of a larger model can take as much.
LEAST_DISK_GIB = 5.0
LEAST_TEMPORARY_GIB = 1.0
PYTORCH = "https://pytorch.org/get-started"


def system() -> Iterator[Finding]:
    yield Finding("system", "ok", platform.platform())


def device() -> Iterator[Finding]:
    """Check the device that a run would use, by computing something on it."""
    import torch

    from pipelines.tools.devices import get_device

    chosen = get_device()
    if chosen.type == "cpu":
        yield _no_gpu()
        return
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else platform.processor()
    number = torch.cuda.device_count() if chosen.type == "cuda" else 1
    value = f"{chosen.type}: {number} × {name}"
    try:
        (torch.ones(64, 64, device=chosen) @ torch.ones(64, 64, device=chosen)).sum().item()
    except RuntimeError as error:
        advice = f"install a build of PyTorch for this GPU ({PYTORCH}), or set ACCELERATE_USE_CPU=true"
        yield Finding("device", "missing", f"{value} cannot be used ({one_line(error, 200)})", advice)
        return
    yield Finding("device", "ok", f"{value}, CUDA {torch.version.cuda}" if torch.version.cuda else value)
    for index in range(number if chosen.type == "cuda" else 0):
        yield _gpu_memory(index)


def _gpu_memory(index: int) -> Finding:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    value = f"{_gib(free)} of {_gib(total)} free"
    name = f"memory of cuda:{index}"
    if free < LEAST_FREE_GPU_SHARE * total:
        return Finding(name, "warning", value, "end the other programs that use it (nvidia-smi lists them)")
    return Finding(name, "ok", value)


def _no_gpu() -> Finding:
    """Return the finding for a machine on which runs use the CPU; a warning if it has a GPU."""
    import torch

    value = f"cpu: {_processor()}"
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return Finding("device", "warning", f"{value}; there is a GPU", "unset ACCELERATE_USE_CPU to use the GPU")
    if not (Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")):
        return Finding("device", "ok", value)
    if torch.version.cuda is None:
        build = f"this build of PyTorch ({torch.__version__}) is for CPUs"
        return Finding("device", "warning", f"{value}; there is an NVIDIA GPU, and {build}", f"see {PYTORCH}")
    try:
        torch.cuda.init()
        reason = "none is visible"
    except RuntimeError as error:
        reason = one_line(error, 200)
    advice = "update the driver, or check CUDA_VISIBLE_DEVICES"
    return Finding("device", "warning", f"{value}; the NVIDIA GPU cannot be used ({reason})", advice)


def _processor() -> str:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or platform.machine()}, {capability}"


def precision() -> Iterator[Finding]:
    from pipelines.tools.devices import bf16_is_faster

    if bf16_is_faster():
        yield Finding("precision", "ok", "bf16 is faster than float32 here; --mixed_precision auto uses it")
    else:
        yield Finding("precision", "ok", "float32; bf16 is not faster here, so --mixed_precision auto does not use it")


def cores() -> Iterator[Finding]:
    """Compare the number of threads of a training process with the cores that it may use."""
    from training.engine.launch import threads_per_process
    from training.engine.threads import usable_cores

    usable, threads, limit = len(usable_cores()) or os.cpu_count() or 1, threads_per_process(), cpu_limit()
    value = f"{usable} of {os.cpu_count()} usable, {threads} threads for each process"
    if limit is not None and limit < threads:
        fitting = max(1, math.floor(limit))
        value = f"{value}, but the container or job is limited to the time of {limit:g} cores"
        advice = f"set OMP_NUM_THREADS={fitting}, or train with --cpu_threads {fitting}"
        yield Finding("cores", "warning", value, advice)
    elif threads != usable:
        yield Finding("cores", "warning", f"{value} (OMP_NUM_THREADS)", "unset OMP_NUM_THREADS to use every core once")
    else:
        yield Finding("cores", "ok", value)


def memory() -> Iterator[Finding]:
    import psutil

    amount, limit = psutil.virtual_memory(), memory_limit()
    value = f"{_gib(amount.available)} of {_gib(amount.total)} available"
    available = amount.available
    if limit is not None and limit < amount.total:
        available = min(available, limit)
        value = f"{value}, but the container or job is limited to {_gib(limit)}"
    if available < LEAST_MEMORY_GIB * GIB:
        advice = "close other programs, or allow the container more; train with a smaller --train_batch_size"
        yield Finding("memory", "warning", value, advice)
    else:
        yield Finding("memory", "ok", value)


def shared_memory() -> Iterator[Finding]:
    """Check /dev/shm, through which the processes of a data loader pass batches; containers often have 64 MiB."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return
    total = shutil.disk_usage(folder).total
    if total < LEAST_SHARED_MEMORY_GIB * GIB:
        advice = "start the container with --shm-size=8g, or use --dataloader_num_workers 0"
        yield Finding("shared memory", "warning", f"{_gib(total)} in {folder}", advice)
    else:
        yield Finding("shared memory", "ok", f"{_gib(total)} in {folder}")


def working_folder() -> Iterator[Finding]:
    yield _folder("working folder", Path.cwd(), LEAST_DISK_GIB, "change to another folder (cd)")


def cache_of_datasets() -> Iterator[Finding]:
    import datasets

    path = Path(datasets.config.HF_DATASETS_CACHE)
    yield _folder("cache of datasets", path, LEAST_DISK_GIB, "set HF_DATASETS_CACHE or HF_HOME to another folder")


def cache_of_the_hub() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    yield _folder("cache of the Hub", Path(HF_HUB_CACHE), LEAST_DISK_GIB, "set HF_HUB_CACHE or HF_HOME to another one")


def temporary_folder() -> Iterator[Finding]:
    path = Path(tempfile.gettempdir())
    yield _folder("temporary folder", path, LEAST_TEMPORARY_GIB, "set TMPDIR to another folder")


def _folder(name: str, path: Path, least_gib: float, advice: str) -> Finding:
    """Check that files can be written to a folder, by writing one. It may not exist yet, and then its parent counts."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"x")
    except OSError as error:
        return Finding(name, "missing", f"{shown(path)} cannot be written ({error.strerror})", advice)
    free = shutil.disk_usage(existing).free
    value = f"{shown(path)}, {_gib(free)} free"
    if free < least_gib * GIB:
        return Finding(name, "warning", value, f"free space, or {advice}")
    return Finding(name, "ok", value)


def emoji_font() -> Iterator[Finding]:
    """Check what data_scripts/make_emoji.py needs: a colour font, and a Pillow that composes emoji of several parts."""
    from PIL import features

    font = system_emoji_font()
    if font is None:
        yield Finding("emoji font", "optional", "none", f"for the dataset of emoji: {HOW_TO_INSTALL}")
    elif not features.check("raqm"):
        advice = "for emoji of several parts (skin tones, flags), install a Pillow with raqm"
        yield Finding("emoji font", "warning", f"{shown(font)}; Pillow has no raqm", advice)
    else:
        yield Finding("emoji font", "ok", shown(font))


def scheduler() -> Iterator[Finding]:
    if shutil.which("sbatch"):
        job = os.environ.get("SLURM_JOB_ID")
        yield Finding("scheduler", "ok", "Slurm (sbatch)" + (f", inside of job {job}" if job else ""))
    else:
        yield Finding("scheduler", "optional", "sbatch was not found", "only for clusters; see docs/runs.md")


def compiler() -> Iterator[Finding]:
    compilers = [os.environ.get("CXX", ""), "g++", "c++", "clang++", "cl"]
    path = next(filter(None, map(shutil.which, filter(None, compilers))), None)
    if path is None:
        yield Finding("C++ compiler", "optional", "none", "for --compile true: install one (apt-get install g++)")
    else:
        yield Finding("C++ compiler", "ok", shown(path))


def _gib(number: float) -> str:
    return f"{number / GIB:.1f} GiB" if number >= GIB / 10 else f"{number / 2**20:.0f} MiB"


CHECKS = {
    "system": system,
    "device": device,
    "precision": precision,
    "cores": cores,
    "memory": memory,
    "shared memory": shared_memory,
    "working folder": working_folder,
    "temporary folder": temporary_folder,
    "cache of datasets": cache_of_datasets,
    "cache of the Hub": cache_of_the_hub,
    "scheduler": scheduler,
    "C++ compiler": compiler,
    "emoji font": emoji_font,
}
