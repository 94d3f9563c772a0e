"""Processes, devices, threads and precision, which are set up before a model is built."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import yaml

from pipelines.tools.cli import UserError
from pipelines.tools.devices import bf16_is_faster, has_accelerator_device
from pipelines.tools.files import read_text
from training.core.exchange import Exchange
from training.core.options import Options, option
from training.engine.signals import Interrupted, launcher_command
from training.engine.threads import place_worker_threads, usable_cores

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

AUTO = "auto"

# Exports, and shares of work that take longer, keep one process busy while the others wait for it, for as long as it
# takes. A process that ended or no longer responds is noticed in another way, see ranks.py.
PROCESS_GROUP_TIMEOUT = timedelta(days=30)

_LAUNCHED_PRECISION = "ACCELERATE_MIXED_PRECISION"

# What an Accelerate config can ask for and the loop does not do: its `distributed_type`, the variable that the launcher
# sets for it, and its name.
_UNSUPPORTED = (
    ("DEEPSPEED", "ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
    ("MEGATRON_LM", "ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ("PARALLELISM_CONFIG", "ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism_config"),
)
_USE_FSDP = "ACCELERATE_USE_FSDP"

# Parameters of mallopt(3): the free memory above which the heap is trimmed, and the size from which a block is mapped
# separately and returned to the system when it is freed.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES, LARGEST_KEPT_BLOCK = 2_000_000_000, 1_000_000_000


@dataclass
class LaunchConfig(Options):
    """Precision and threads of each process; everything else comes from the Accelerate config."""

    mixed_precision: Literal["no", "fp16", "bf16", "auto"] | None = option(
        AUTO, on_resume="warn", choices=("no", "fp16", "bf16", AUTO), essential=True, kept=True
    )
    """Precision. auto: that of the Accelerate config if it is fp16 or bf16, otherwise bf16 where the device is faster
    with it; a resumed run keeps what it has"""
    cpu_threads: int = option(0, on_resume="free", at_least=0)
    """Number of CPU threads per process; 0 divides the machine's cores among its processes"""
    process_timeout: float = option(60.0, on_resume="free", at_least=10)
    """With several processes: number of seconds after which a process that no longer responds ends the run. One on
    the same computer that has ended is noticed within seconds"""

    @property
    def consists_of_products(self) -> bool:
        """Whether almost all of the work of the networks is products of large matrices, as in a transformer."""
        return False


def automatic_precision(config: LaunchConfig) -> str:
    """Return the precision that `--mixed_precision auto` means in this process: no, fp16 or bf16."""
    # `accelerate launch` always sets the variable; its "no" may only mean that nobody chose a precision.
    launched = os.environ.get(_LAUNCHED_PRECISION, "no")
    if launched != "no":
        return launched
    return "bf16" if bf16_is_faster(products=config.consists_of_products) else "no"


def start_accelerator(config: LaunchConfig, kept: str | None = AUTO) -> Accelerator:
    """Create the Accelerator of this run, for the device and the processes that the launcher chose.

    Args:
        kept: the precision of `--mixed_precision auto` in a run that is resumed. With None, which earlier versions
            saved, it is that of the Accelerate config.

    Raises:
        UserError: fp16 on a CPU, or a launcher that was asked for another number of processes than it started, or for
            another kind of parallelism than DDP and FSDP2.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    chosen = kept if config.mixed_precision == AUTO else config.mixed_precision
    precision = chosen or os.environ.get(_LAUNCHED_PRECISION, "no")
    if precision == AUTO:
        precision = automatic_precision(config)
    if precision == "fp16" and not has_accelerator_device():
        raise UserError(
            "--mixed_precision fp16 needs a GPU, and this run is on a CPU; use bf16 or no "
            "(flag --mixed_precision, or mixed_precision in the Accelerate config)"
        )
    _check_parallelism()
    with _without_fsdp():
        accelerator = Accelerator(
            # Without cpu=True, Accelerate ignores torchrun on CPUs: each rank would train alone.
            cpu=not has_accelerator_device(),
            mixed_precision=precision,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=PROCESS_GROUP_TIMEOUT),
                # Buffers need no broadcast, as no model keeps running statistics that could differ between ranks.
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            ],
        )
    _check_world_size(accelerator.num_processes)
    if accelerator.device.type == "cpu":
        prepare_cpu(config)
        # The tokenizer's threads gain nothing for the captions of one batch, and compete with torch's threads.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return accelerator


def prepare_cpu(config: LaunchConfig) -> None:
    """Start the CPU threads of this process, and let it keep its memory.

    What is timed before the run begins calls it as well, since threads stay where they were started first.
    """
    threads = config.cpu_threads or threads_per_process()
    torch.set_num_threads(threads)
    place_worker_threads(threads)
    keep_freed_memory()


def close_process_group_at_exit() -> None:
    """Close the group of all processes when this process exits; if it is still open then, the process can abort.

    It is not closed earlier: a second group under the same launcher would find the addresses of the first one in the
    launcher's store, and could wait for them for ever.
    """
    atexit.unregister(_close_process_group)
    atexit.register(_close_process_group)


def _close_process_group() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run `action` on the main process; return its result, or raise its UserError or Interrupted, on every process.

    Any other exception ends the main process, and the launcher then ends the others.
    """
    return exchange_of(accelerator).on_main(action)


def exchange_of(accelerator: Accelerator, *, stops_together: bool = True) -> Exchange:
    """Return the exchange between the processes of a run.

    Args:
        stops_together: whether all processes raise `Interrupted` at the end of the part in which one of them was asked
            to stop. Without it, this process leaves the part at once, and no later exchange with it is possible.
    """
    return Exchange(
        accelerator.process_index,
        accelerator.num_processes,
        lambda value: gather(accelerator, value),
        (UserError, Interrupted) if stops_together else (UserError,),
    )


def gather(accelerator: Accelerator, value: Any) -> list[Any]:
    """Return the values of all processes in order of rank, on every process; meant for small objects."""
    if accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def threads_per_process() -> int:
    """Return the number of usable cores divided by the processes on this machine, or the user's OMP_NUM_THREADS.

    `accelerate launch` and torchrun set OMP_NUM_THREADS to 1, which halves the speed of a two-core machine. A value
    of 1 is therefore ignored under a launcher.
    """
    chosen = _as_int(os.environ.get("OMP_NUM_THREADS"))
    if chosen and not (chosen == 1 and launcher_command()):
        return chosen
    cores = len(usable_cores()) or os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def keep_freed_memory() -> None:
    """Make glibc's allocator keep freed memory instead of returning it to the system, unless the user configured it.

    Each step allocates the memory that the previous step freed. If it was returned to the system in between, it has to
    be mapped again page by page, and filled with zeros. This costs 25,000 page faults per step for the quickstart's
    U-Net, a tenth of its time.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):  # another system, another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BLOCK)


def device_name(device: torch.device) -> str:
    """Return the model of a GPU, or the type of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _check_world_size(started: int) -> None:
    """Raise UserError unless the launcher started as many processes as requested.

    `accelerate launch --cpu --num_processes 2` and MULTI_CPU configs start a single process without a warning.
    """
    for requested in (_requested_processes(launcher_command()), _as_int(os.environ.get("WORLD_SIZE"))):
        if requested is not None and requested != started:
            raise UserError(
                f"the launcher was asked for {requested} processes and started {started}; "
                f"on CPUs use: torchrun --nproc-per-node {requested} training/train_X.py …"
            )


def shards_weights() -> bool:
    """Return whether the launcher was asked for FSDP2, which divides the weights among the processes."""
    return _asks_for("FSDP", _USE_FSDP)


def _asks_for(kind: str, variable: str) -> bool:
    """Return whether the launcher was asked for a kind of parallelism, by its variable or in its config file.

    `accelerate launch --cpu` ignores what its config file says of it.
    """
    asked = str(_launch_config(launcher_command()).get("distributed_type", "")).upper()
    return asked == kind or os.environ.get(variable, "").lower() == "true"


def _check_parallelism() -> None:
    """Raise UserError if the launcher was asked for another kind of parallelism than DDP and FSDP2.

    On CPUs, Accelerate would train with DDP instead, without a word. On GPUs, it would shard the weights in ways that
    the loop does not know.
    """
    for kind, variable, name in _UNSUPPORTED:
        if _asks_for(kind, variable):
            raise UserError(
                f"the Accelerate config asks for {name}, and training is data parallel: DDP, or FSDP2 for models that "
                "are too large for one GPU. Use configs/accelerate/multi_gpu.yaml, multi_node.yaml for several "
                "machines, or fsdp2.yaml. If a GPU has too little memory, --auto_batch_size true and "
                "--gradient_checkpointing true need no other config"
            )
    if not shards_weights():
        return
    settings = _launch_config(launcher_command()).get("fsdp_config") or {}
    version = os.environ.get("FSDP_VERSION") or settings.get("fsdp_version", 1)
    if str(version) != "2":
        raise UserError(
            f"the Accelerate config asks for FSDP with fsdp_version {version}, and only version 2 is supported; use "
            "configs/accelerate/fsdp2.yaml"
        )
    offload = os.environ.get("FSDP_OFFLOAD_PARAMS") or settings.get("fsdp_offload_params", False)
    if str(offload).lower() == "true":
        raise UserError(
            "the Accelerate config asks for fsdp_offload_params, which is not supported; use "
            "configs/accelerate/fsdp2.yaml"
        )


@contextlib.contextmanager
def _without_fsdp() -> Iterator[None]:
    """Hide from Accelerate that FSDP2 was asked for, inside the block.

    It would wrap models and optimizers itself, and only in ways in which nothing else may use them. `sharding.py`
    shards the weights; Accelerate is responsible for processes, devices and precision, as for DDP.
    """
    asked = os.environ.pop(_USE_FSDP, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[_USE_FSDP] = asked


def _requested_processes(command: list[str]) -> int | None:
    """Return the number of processes in an `accelerate launch` command or its config file; None if unknown."""
    if not _is_accelerate(command):
        return None  # torchrun always starts the requested number
    given = _launcher_flag(command, "num_processes")
    return _as_int(_launch_config(command).get("num_processes") if given is None else given)


def _launch_config(command: list[str]) -> dict[str, Any]:
    """Return the settings of the config file that an `accelerate launch` command reads; empty if it reads none.

    It is the file that the command names, or else the one that `accelerate config` has written, which Accelerate does
    not read with `--cpu`.
    """
    if not _is_accelerate(command):
        return {}
    named = _launcher_flag(command, "config_file")
    if named is None and "--cpu" in _launcher_words(command):
        return {}
    if named is None:
        from accelerate.commands.config.config_args import default_config_file

        named = default_config_file
    path = Path(named)
    settings = yaml.safe_load(read_text(path)) if path.is_file() else None  # JSON is YAML as well
    return settings if isinstance(settings, dict) else {}


def _launcher_flag(command: list[str], name: str) -> str | None:
    """Return the value of a flag of the launcher, given as one word or two, with _ or -; None if it is not given."""
    words = _launcher_words(command)
    value = None
    for word, following in itertools.zip_longest(words, words[1:]):
        flag, is_one_word, own = word.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name:
            value = own if is_one_word else following
    return value


def _launcher_words(command: list[str]) -> list[str]:
    """Return the words of a launcher's command before the script, whose flags may have the same names."""
    words = command[_place_of_accelerate(command) + 1 :]
    ends = (place for place, word in enumerate(words) if word in ("-m", "--module") or word.endswith(".py"))
    return words[: next(ends, len(words))]


def _is_accelerate(command: list[str]) -> bool:
    return _place_of_accelerate(command) >= 0


def _place_of_accelerate(command: list[str]) -> int:
    """Return the position of Accelerate's program or module in a launcher's command; -1 if it is another launcher."""
    for place, word in enumerate(command[:6]):
        if Path(word).name in ("accelerate", "accelerate-launch") or word.startswith("accelerate.commands."):
            return place
    return -1


def _as_int(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None
