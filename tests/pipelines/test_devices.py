"""`get_device` selects the device of every command; no command queries torch itself."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipelines.tools.cli import USER_ERROR_STATUS, UserError
from pipelines.tools.devices import DEVICE_HELP, get_device, has_accelerator_device, release_cached_memory
from tests.conftest import ROOT
from training.core.memory import memory_mib, peak_memory_mib

SOURCES = [p for folder in ("pipelines", "training", "data_scripts") for p in sorted((ROOT / folder).rglob("*.py"))]
RULE = ROOT / "pipelines" / "tools" / "devices.py"
LOADS_A_MODEL = re.compile(r"\b(load_pipeline|load_on_device|load_captioner|load_vae)\(")


def machine(monkeypatch, cuda: int = 0, mps: bool = False, use_cpu: str | None = None) -> None:
    """Simulate a machine with this number of CUDA devices, or with MPS."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if use_cpu is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", use_cpu)


@pytest.mark.parametrize(
    ("hardware", "expected"),
    [
        ({}, "cpu"),
        ({"cuda": 2}, "cuda"),
        ({"mps": True}, "mps"),
        ({"cuda": 2, "use_cpu": "false"}, "cuda"),
        ({"cuda": 2, "use_cpu": "true"}, "cpu"),
        ({"mps": True, "use_cpu": "1"}, "cpu"),
        ({"use_cpu": "True"}, "cpu"),
    ],
)
def test_the_default_is_the_gpu_unless_the_environment_disables_it(monkeypatch, hardware, expected):
    machine(monkeypatch, **hardware)
    assert get_device() == torch.device(expected)
    assert has_accelerator_device() == (expected != "cpu")


@pytest.mark.parametrize(
    ("hardware", "local_rank", "expected"),
    [
        ({"cuda": 4}, 3, "cuda:3"),
        ({"cuda": 4}, 5, "cuda:1"),
        ({"cuda": 4, "use_cpu": "true"}, 3, "cpu"),
        ({"mps": True}, 1, "mps"),
        ({}, 1, "cpu"),
    ],
)
def test_each_process_uses_its_own_gpu(monkeypatch, hardware, local_rank, expected):
    machine(monkeypatch, **hardware)
    assert get_device(local_rank=local_rank) == torch.device(expected)


def test_a_named_device_overrides_the_default(monkeypatch):
    machine(monkeypatch, cuda=2)
    assert get_device("cpu", local_rank=1) == torch.device("cpu")


@pytest.mark.parametrize("name", ["warp", "gpu", "", "cuda:99", "cuda:x", "hpu", "meta", "privateuseone"])
def test_an_unavailable_device_is_a_user_error(name):
    with pytest.raises(UserError, match=rf"^--device {name} cannot be used here \(.+\); name another, such as cpu"):
        get_device(name)


def words(command: str, folder: Path) -> list[str]:
    """Return arguments with which the command gets as far as selecting its device; the model is an empty pipeline."""
    model, image = str(folder / "model"), str(folder / "images" / "0.png")
    return {
        "sample": ["--model", model, "--prompt", "a", "--output", str(folder / "grid.png")],
        "caption": [image, "--model", model],
        "caption_images": ["--train_data_dir", str(folder / "images"), "--model", model],
        "analyze": [image, "--model", model, "--output_dir", str(folder / "report")],
        "make_controls": ["--kind", "layout", "--encoder", model, "--train_data_dir", str(folder / "images")]
        + ["--output_dir", str(folder / "controls")],
        "precompute_latents": ["--vae", model, "--dataset_name", "any", "--output_dir", str(folder / "cache")],
        "evaluate": ["--model", model],
        "innovate": ["--model", model, "--reader", model, "--output_dir", str(folder / "search")],
        "captions": ["--side", "memory", "--preset", "emoji_64", "--output", str(folder / "figures.json")],
    }[command]


def commands_with_models() -> list[Path]:
    """Return all commands that load a model and choose a device.

    In the training loop, Accelerate chooses it, and an export is compared with its model on the CPU.
    """
    texts = {path: path.read_text() for path in SOURCES}
    return [
        path
        for path, text in texts.items()
        if "__main__" in text and LOADS_A_MODEL.search(text) and path.stem != "export"
        if "from training.engine.session import" not in text
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    here = tmp_path_factory.mktemp("devices")
    for name in ("model", "images"):
        (here / name).mkdir()
    (here / "model" / "model_index.json").write_text("{}")
    Image.new("RGB", (64, 64)).save(here / "images" / "0.png")
    return here


@pytest.mark.parametrize(
    "path", [*commands_with_models(), ROOT / "training/benchmarks/captions.py"], ids=lambda p: p.stem
)
def test_every_command_accepts_a_device_and_checks_it_before_the_model(folder, path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    with pytest.raises(UserError, match="--device warp cannot be used here"):
        module.main([*words(path.stem, folder), "--device", "warp"])


def test_as_a_program_an_unavailable_device_gives_one_line_and_status_2(folder):
    command = [sys.executable, ROOT / "pipelines" / "sample.py", *words("sample", folder), "--device", "warp"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == USER_ERROR_STATUS
    assert done.stderr.startswith("error: --device warp cannot be used here")
    assert len(done.stderr.splitlines()) == 1


def device_helps(path: Path) -> list[str]:
    """Return the help texts of the option `device`: under the dataclass field, or in `add_argument`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    helps = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for field, text in zip(node.body, node.body[1:]):
                if isinstance(field, ast.AnnAssign) and ast.unparse(field.target) == "device":
                    helps.append(ast.literal_eval(text.value) if isinstance(text, ast.Expr) else "")
        if isinstance(node, ast.Call) and node.args and ast.unparse(node.args[0]) == "'--device'":
            helps += [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "help"]
    return [DEVICE_HELP if text == "DEVICE_HELP" else text for text in helps]


def test_every_command_has_the_same_help_for_its_device():
    commands = [path for path in SOURCES if "__main__" in path.read_text()]
    helps = {path.stem: device_helps(path) for path in commands if device_helps(path)}
    assert set(helps) >= {path.stem for path in commands_with_models()}
    assert {text for texts in helps.values() for text in texts} == {DEVICE_HELP}


def test_cached_memory_of_a_mac_is_released(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: calls.append("mps"))
    for device in ("mps", "cpu"):
        release_cached_memory(torch.device(device))
    assert calls == ["mps"]


def test_memory_of_a_mac_is_that_of_its_gpu_and_not_of_the_process(monkeypatch):
    """The functions of torch.mps need the hardware, so numbers stand for what they return."""
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3 * 2**20)
    assert memory_mib(torch.device("mps")) == peak_memory_mib(torch.device("mps")) == 3.0
    for measured in (memory_mib, peak_memory_mib):
        resident = measured(torch.device("cpu"))
        assert resident is None or resident > 50


# They describe devices and choose none: the checks of make doctor, and the power that a device takes.
DESCRIBING = {"training/diagnostics/machine.py", "training/diagnostics/software.py", "training/publishing/energy.py"}
CHOOSING = [path for path in SOURCES if path != RULE and path.relative_to(ROOT).as_posix() not in DESCRIBING]


@pytest.mark.parametrize("path", CHOOSING, ids=lambda p: p.stem)
def test_no_other_file_queries_or_names_devices(path):
    """Comparisons such as `device.type == "cuda"`, are allowed; questions about the memory of a device are not."""
    text = path.read_text()
    memory = ("memory_reserved(", "memory_allocated(", "allocated_memory(", "torch.mps")
    for question in ("cuda.is_available(", "backends.mps", "mps.is_available(", "ACCELERATE_USE_CPU", *memory):
        assert question not in text, f"{path}: use get_device of pipelines/tools/devices.py"
    tree = ast.parse(text)
    # `install_command("cuda", …)` names an extra.
    harmless = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) or isinstance(node, ast.Call) and ast.unparse(node.func) == "install_command"
    )
    compared = {id(part) for node in harmless for part in ast.walk(node)}
    named = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in ("cuda", "mps") and id(node) not in compared
    ]
    assert named == [], f"{path}: use get_device of pipelines/tools/devices.py"
