"""Threads, precision, processes, and errors on the main process."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipelines.tools.cli import UserError
from pipelines.tools.devices import bf16_is_faster
from tests.conftest import ROOT, forget_accelerate
from tests.support.runs import environment
from training import train_decoder
from training.engine import launch
from training.engine.launch import on_main, start_accelerator, threads_per_process
from training.engine.run_config import RunConfig

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("omp", "launcher", "local_processes", "expected"),
    [
        (None, [], "1", CORES),
        ("3", [], "1", 3),
        ("1", [], "1", 1),  # set by the user
        ("1", ["accelerate", "launch"], "1", CORES),  # set by the launcher
        ("3", ["accelerate", "launch"], "1", 3),
        (None, [], str(2 * CORES), 1),
    ],
)
def test_threads_share_the_machine(monkeypatch, omp, launcher, local_processes, expected):
    monkeypatch.setattr(launch, "launcher_command", lambda: launcher)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local_processes)
    if omp is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    assert threads_per_process() == expected


def test_cpu_threads_are_set(threads):
    start_accelerator(RunConfig(cpu_threads=1))
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("native", [False, True])
def test_auto_precision_is_bf16_if_the_cpu_supports_it(monkeypatch, threads, native):
    forget_accelerate()
    monkeypatch.setattr(launch, "bf16_is_faster", lambda products: native)
    assert start_accelerator(RunConfig(mixed_precision="auto", cpu_threads=1)).mixed_precision == (
        "bf16" if native else "no"
    )
    forget_accelerate()


@pytest.mark.parametrize("denoiser", ["unet", "transformer"])
def test_auto_precision_depends_on_the_network(monkeypatch, denoiser):
    """A transformer consists of products of matrices, which more processors compute faster in bfloat16."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(launch, "bf16_is_faster", lambda products: products)
    config = train_decoder.Config(dataset_name="x", denoiser=denoiser)
    assert launch.automatic_precision(config) == ("bf16" if denoiser == "transformer" else "no")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or torch.cuda.is_available(), reason="reads /proc/cpuinfo")
def test_bf16_is_faster_on_cpus_with_matrix_units():
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    assert bf16_is_faster() == ("amx_bf16" in flags)
    assert bf16_is_faster(products=True) == ("amx_bf16" in flags or "avx512_bf16" in flags)


@pytest.mark.parametrize(
    "command",
    [
        ["accelerate", "launch", "--cpu", "--num_processes", "2", "x.py"],
        ["accelerate", "launch", "--num_processes=2", "x.py"],
        ["accelerate", "launch", "--config_file", "FILE", "x.py"],
        ["python", "-m", "accelerate.commands.launch", "--config-file=FILE", "-m", "x", "--num_processes", "1"],
    ],
)
def test_fewer_processes_than_requested_are_an_error(monkeypatch, tmp_path, command):
    (tmp_path / "a.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    words = [word.replace("FILE", str(tmp_path / "a.yaml")) for word in command]
    monkeypatch.setattr(launch, "launcher_command", lambda: words)
    with pytest.raises(UserError, match=r"asked for 2 processes and started 1; .* torchrun --nproc-per-node 2"):
        start_accelerator(RunConfig())


@pytest.mark.parametrize("command", [["accelerate-launch"], ["python", "-m", "accelerate.commands.launch"]])
def test_a_launcher_without_flags_asks_for_no_number_of_processes(monkeypatch, command):
    """Flags after the script are its own."""
    monkeypatch.setattr(launch, "launcher_command", lambda: [*command, "x.py", "--num_processes", "2"])
    assert start_accelerator(RunConfig()).num_processes == 1


TWO_PROCESSES = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\n"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["by accelerate config", "as one word", "as two words"])
def test_an_accelerate_config_of_two_processes_on_cpus_is_refused_in_a_real_launch(tmp_path, how):
    """Accelerate would start one process without a word; its default config is the file of `accelerate config`."""
    file = tmp_path / "accelerate/default_config.yaml" if how == "by accelerate config" else tmp_path / "two.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(TWO_PROCESSES)
    flags = {"as one word": [f"--config_file={file}"], "as two words": ["--config_file", str(file)]}.get(how, [])
    done = accelerate_launch(tmp_path, *flags)
    assert "error: the launcher was asked for 2 processes and started 1" in done.stderr
    assert not (tmp_path / "run/metrics.csv").exists()
    assert done.returncode != 0


@pytest.mark.slow
def test_the_default_config_of_accelerate_is_not_read_where_a_flag_replaces_it(tmp_path):
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate/default_config.yaml").write_text(TWO_PROCESSES)
    done = accelerate_launch(tmp_path, "--num_processes", "1")
    assert done.returncode == 0, done.stderr


def accelerate_launch(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Launch one step of the toy stage with Accelerate, whose own config would be in `folder`."""
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch", *flags]
    script = [str(ROOT / "tests/support/toy.py"), "--output_dir", str(folder / "run"), "--report_to", "none",
              "--max_train_steps", "1", "--cpu_threads", "1", "--preview_epochs", "0"]  # fmt: skip
    variables = environment(PYTHONPATH=str(ROOT), HF_HOME=str(folder))
    return subprocess.run([*launcher, *script], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=240)


OTHER_KINDS = (
    r"^the Accelerate config asks for (DeepSpeed|Megatron-LM), and training is data parallel: DDP, or FSDP2 for models "
    r"that are too large for one GPU\. Use configs/accelerate/multi_gpu\.yaml, multi_node\.yaml for several machines, "
    r"or fsdp2\.yaml\. If a GPU has too little memory, --auto_batch_size true and --gradient_checkpointing true need "
    r"no other config$"
)
FIRST_FSDP = r"FSDP with fsdp_version 1, and only version 2 is supported; use configs/accelerate/fsdp2.yaml"


@pytest.mark.parametrize(
    ("kind", "expected"), [("DEEPSPEED", OTHER_KINDS), ("MEGATRON_LM", OTHER_KINDS), ("FSDP", FIRST_FSDP)]
)
def test_parallelism_that_would_not_come_is_an_error(monkeypatch, tmp_path, kind, expected):
    """By the variable that the launcher sets, and by its config file, which `--cpu` makes it ignore."""
    with monkeypatch.context() as launched:
        launched.setenv(f"ACCELERATE_USE_{kind}", "true")
        with pytest.raises(UserError, match=expected):
            start_accelerator(RunConfig())
    config = tmp_path / "a.yaml"
    config.write_text(f"distributed_type: {kind}\nnum_processes: 1\n")
    words = ["accelerate", "launch", "--cpu", "--config_file", str(config), "x.py"]
    monkeypatch.setattr(launch, "launcher_command", lambda: words)
    with pytest.raises(UserError, match=expected):
        start_accelerator(RunConfig())


def test_fsdp2_is_asked_for_by_its_config_and_offloading_is_refused(monkeypatch, tmp_path):
    assert not launch.shards_weights()
    config = tmp_path / "a.yaml"
    words = ["accelerate", "launch", "--config_file", str(config), "x.py"]
    monkeypatch.setattr(launch, "launcher_command", lambda: words)
    config.write_text((ROOT / "configs/accelerate/fsdp2.yaml").read_text().replace("num_processes: 8", ""))
    assert launch.shards_weights()
    start_accelerator(RunConfig())
    config.write_text(config.read_text() + "  fsdp_offload_params: true\n")
    with pytest.raises(UserError, match="fsdp_offload_params, which is not supported"):
        start_accelerator(RunConfig())


def test_a_script_under_a_deepspeed_config_ends_with_status_2():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/support/toy.py")], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "ACCELERATE_USE_DEEPSPEED": "true", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    message = done.stderr.removeprefix("error: ").strip()
    assert re.match(OTHER_KINDS, message), message
    assert "asks for DeepSpeed" in message
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_deepspeed_config_is_refused_under_a_launcher(tmp_path):
    """By Accelerate if the package is missing, before the training starts, as docs/runs.md says; on CPUs by this."""
    config = tmp_path / "deepspeed.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_machines: 1\nnum_processes: 1\n"
        "mixed_precision: 'no'\ndeepspeed_config:\n  zero_stage: 2\n"
    )
    on_cpu = accelerate_launch(tmp_path, "--cpu", "--config_file", str(config))
    assert on_cpu.returncode != 0
    lines = [line.removeprefix("error: ") for line in on_cpu.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.match(OTHER_KINDS, lines[0])
    if importlib.util.find_spec("deepspeed") is None:
        done = accelerate_launch(tmp_path, "--config_file", str(config))
        assert done.returncode == 1
        assert "DeepSpeed is not installed" in done.stderr
        assert "DeepSpeed is not installed" in (ROOT / "docs/runs.md").read_text(encoding="utf-8")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda file: file.name)
def test_each_shipped_config_says_when_to_use_it_and_is_known_to_accelerate(file):
    from accelerate.commands.config.config_args import ClusterConfig

    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert len([line for line in lines if not line.startswith("#")]) <= 10
    config = ClusterConfig.from_yaml_file(str(file))
    assert config.num_processes >= config.num_machines


def test_a_rank_that_trains_alone_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="asked for 2 processes and started 1"):
        launch._check_world_size(1)


def test_the_result_and_the_error_of_the_main_process():
    accelerator = start_accelerator(RunConfig())
    assert on_main(accelerator, lambda: 7) == 7

    def fail():
        raise UserError("wrong value")

    with pytest.raises(UserError, match="wrong value"):
        on_main(accelerator, fail)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's allocator")
def test_freed_memory_is_kept():
    """Allocating 40 blocks of 32 MB, one after another, causes page faults for the first one only."""
    code = (
        "import os, resource, torch; from training.engine.launch import start_accelerator; "
        "from training.engine.run_config import RunConfig; start_accelerator(RunConfig(output_dir='x'))\n"
        "torch.ones(2**23)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(40): torch.ones(2**23)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 2**25)\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    blocks = {}
    for kept, variables in ((True, clean), (False, {**clean, "MALLOC_TRIM_THRESHOLD_": "131072"})):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        blocks[kept] = float(done.stdout.split()[-1])
    assert blocks[True] < 8 < 20 < blocks[False]
