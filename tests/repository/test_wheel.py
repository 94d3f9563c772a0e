"""A wheel contains everything it needs: once installed, it makes data, trains, samples and writes model cards from any
folder, without the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from tests.conftest import ROOT
from tests.scripts.conftest import COMMON, TINY_AUTOENCODER, TINY_DIFFUSION
from tests.support.browser import FLAGS, Visitor, find_chromium, needs_chromium, studio
from tests.support.environments import environment_of
from tests.support.runs import environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PACKAGES = ("pipelines", "training", "data_scripts", "halftone_trainer")
NEEDED_TO_BUILD = (*PACKAGES, "configs", "model_cards", "pyproject.toml", "setup.py", "README.md", "LICENSE")
KINDS = (".yaml", ".jinja")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
WITHOUT_NETWORK = ("--no-deps", "--no-index", "--no-build-isolation")

Run = Callable[..., subprocess.CompletedProcess]


def run_in(folder: Path, python: str) -> Run:
    """Return a function `run("halftone", …)` that starts a program of the environment of `python` in `folder`, isolated
    from the repository."""

    def run(program: str, *words: str, status: int = 0) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [Path(python).with_name(program), *words],
            cwd=folder, env=environment(PYTHONPATH="", PYTHONSAFEPATH=""), capture_output=True, text=True,
        )  # fmt: skip
        output = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        assert done.returncode == status, f"status {done.returncode} of {program} {' '.join(words)}\n{output}"
        return done

    return run


def pip(*words: str | Path) -> None:
    done = subprocess.run([*PIP, *words], env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def dependencies() -> list[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the files that a wheel is built from, because building leaves files behind."""
    folder = tmp_path_factory.mktemp("source")
    for name in NEEDED_TO_BUILD:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", *WITHOUT_NETWORK, "--wheel-dir", folder, source)
    (built,) = folder.glob("*.whl")
    assert built.name.startswith("halftone_trainer-")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> str:
    """The Python interpreter of an environment with the wheel and its dependencies."""
    interpreter = environment_of(tmp_path_factory.mktemp("installed") / "venv", *dependencies())
    pip("--python", interpreter, "install", *WITHOUT_NETWORK, wheel)
    return interpreter


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def run(workplace, python) -> Run:
    return run_in(workplace, python)


@pytest.fixture(scope="module")
def autoencoder(run, workplace) -> Path:
    """A run of `halftone train autoencoder`: a few steps on posters that its config makes."""
    shares = "--validation_fraction 0.1 --test_fraction 0.1 --num_workers 1"
    recipe = f"data_scripts/make_posters.py --num_posters 40 {shares} --output_dir data/posters"
    (workplace / "mine.yaml").write_text(f"dataset_name: data/posters\nprepare:\n  data/posters: {recipe}\n")
    flags = (*COMMON, *TINY_AUTOENCODER, "--max_train_steps", "2", "--output_dir", "runs/autoencoder")
    run("halftone", "train", "autoencoder", "--config", "mine.yaml", *flags)
    return workplace / "runs/autoencoder"


@pytest.fixture(scope="module")
def diffusion_flags(run, autoencoder) -> tuple[str, ...]:
    run("halftone", "data", "train_tokenizer", "--dataset_name", "data/posters", "--output_dir", "data/tokenizer")
    inputs = ("--dataset_name", "data/posters", "--tokenizer", "data/tokenizer", "--vae", "runs/autoencoder")
    return (*COMMON, *TINY_DIFFUSION, *inputs, "--max_train_steps", "2", "--output_dir", "runs/diffusion")


@pytest.fixture(scope="module")
def diffusion(run, workplace, diffusion_flags) -> Path:
    run("python", "-m", "training.train_latent_diffusion", *diffusion_flags)
    return workplace / "runs/diffusion"


def test_it_contains_every_module_preset_and_template(wheel):
    contained = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    code = {p.relative_to(ROOT).as_posix() for package in PACKAGES for p in (ROOT / package).rglob("*.py")}
    shipped = [*(ROOT / "configs").rglob("*"), *(ROOT / "model_cards").rglob("*")]
    files = {file for file in shipped if file.suffix in KINDS}
    assert len(files) > 50
    assert contained == code | {f"halftone_trainer/{file.relative_to(ROOT).as_posix()}" for file in files}


def test_the_repository_is_not_on_the_path(run):
    output = run("python", "-c", "import training, sys; print(training.__file__); print(*sys.path, sep='\\n')").stdout
    assert "site-packages" in output.splitlines()[0]
    assert str(ROOT) not in output.replace(str(ROOT / ".venv"), "")


def test_an_autoencoder_trains_and_its_record_contains_the_command(autoencoder):
    card = (autoencoder / "pipeline/README.md").read_text(encoding="utf-8")
    assert "Halftone 0." in card
    assert "halftone train autoencoder --config mine.yaml" in (autoencoder / "sessions.md").read_text(encoding="utf-8")
    assert "halftone data make_posters --num_posters 40" in (autoencoder / "run.log").read_text(encoding="utf-8")


def test_latent_diffusion_trains_as_a_module_and_samples(run, workplace, diffusion):
    assert "path/to/this/folder" in (diffusion / "pipeline/README.md").read_text(encoding="utf-8")
    assert "python -m training.train_latent_diffusion" in (diffusion / "sessions.md").read_text(encoding="utf-8")
    run("halftone", "sample", "--model", "runs/diffusion", "--prompt", "a poster", "--num_images", "2",
        "--num_inference_steps", "2", "--output", "grid.png")  # fmt: skip
    with Image.open(workplace / "grid.png") as grid:
        assert grid.width > grid.height >= 64


@needs_chromium
def test_the_studio_shows_a_model(wheel, diffusion, tmp_path):
    python = environment_of(tmp_path / "venv", *dependencies(), "gradio")
    pip("--python", python, "install", *WITHOUT_NETWORK, wheel)
    program = (str(Path(python).with_name("halftone")), "demo")
    with (
        studio("--model", str(diffusion), "--runs", str(diffusion.parent), cwd=tmp_path, program=program) as address,
        sync_playwright() as driver,
    ):
        browser = driver.chromium.launch(executable_path=find_chromium(), args=list(FLAGS))
        visitor = Visitor(browser, address)
        visitor.open(diffusion.name, "Text to image")
        visitor.write("Prompt", "a poster")
        visitor.set_slider("Number of images", 1)
        visitor.press("Generate")
        visitor.wait_for_status("1 images in")
        assert visitor.download().text["prompt"] == "a poster"
        visitor.open("Training runs")
        visitor.wait_for_status("complete")
        browser.close()


def test_accelerate_launches_the_module_with_a_shipped_config(run, diffusion, diffusion_flags):
    config = run("halftone", "path", "accelerate/cpu").stdout.strip()
    launch = ("-m", "accelerate.commands.launch", "--config_file", config, "-m", "training.train_latent_diffusion")
    run("python", *launch, *diffusion_flags, "--max_train_steps", "3")
    assert json.loads((diffusion / "record.json").read_text(encoding="utf-8"))["steps"] == 3
    assert "accelerate launch -m training.train_latent_diffusion" in (diffusion / "sessions.md").read_text(
        encoding="utf-8"
    )


def test_presets_are_found_by_name_from_any_folder(run):
    code = "from training.api import load_config; c = load_config({!r}); print(type(c).__module__, c.resolution)"
    for name in ("latent_diffusion/quickstart", "configs/experiments/latent_diffusion/quickstart.yaml"):
        assert run("python", "-c", code.format(name)).stdout == "training.train_latent_diffusion 64\n"
    pattern = "configs/experiments/latent_diffusion/ablation/tiny/*.yaml"
    output = run("halftone", "run_experiments", pattern, "--print_commands").stdout
    assert output.count("train_latent_diffusion.py --config") == 6


def test_doctor_reads_the_requirements_of_the_installed_copy(run, workplace):
    output = run("halftone", "doctor", "--output", "doctor.json").stdout
    checks = json.loads((workplace / "doctor.json").read_text(encoding="utf-8"))["checks"]
    found = {check["name"]: check for check in checks}
    assert "Nothing is missing that every run needs." in output
    assert {requirement.split("[")[0].split(">")[0] for requirement in dependencies()} <= found.keys()
    assert found["extra cuda"]["state"] == "optional"
    assert found["extra cuda"]["value"].startswith("bitsandbytes not installed")
    assert found["extra cuda"]["advice"].endswith("pip install 'bitsandbytes>=0.48,<1'")


def test_error_messages_name_commands_that_work_here(run):
    words = ("latent_diffusion", "--vae", "x", "--dataset_name", "x", "--recipe", "none")
    error = run("halftone", "train", *words, status=2).stderr
    assert "halftone data train_tokenizer" in error
    assert "data_scripts/" not in error
    flags = ("--dataset_name", "data/posters", "--optimizer", "adamw_8bit", "--output_dir", "runs/x", "--cpu_threads")
    error = run("halftone", "train", "autoencoder", *COMMON, *TINY_AUTOENCODER, *flags, "1", status=2).stderr
    assert "pip install bitsandbytes" in error


def test_an_editable_install_works_from_another_folder(source, tmp_path):
    python = environment_of(tmp_path / "venv", *dependencies(), "setuptools")
    pip("--python", python, "install", *WITHOUT_NETWORK, "--editable", source)
    (tmp_path / "elsewhere").mkdir()
    run = run_in(tmp_path / "elsewhere", python)
    shown = run("halftone", "path", "latent_diffusion/quickstart").stdout.strip()
    assert shown == str(source / "configs/experiments/latent_diffusion/quickstart.yaml")
    run("halftone", "data", "make_posters", "--num_posters", "2", "--num_workers", "1", "--output_dir", "posters")
    code = "from training.publishing.model_card import check_card; check_card('autoencoder.md.jinja')"
    run("python", "-c", code)
    error = run("halftone", "train", "autoencoder", "--config", "autoencoder/quickstrt", status=2).stderr
    assert "did you mean 'autoencoder/quickstart'?" in error
