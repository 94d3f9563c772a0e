"""Pipelines published by this version load and draw with the oldest stated and the newest versions of Diffusers and
Transformers, with the images of this environment.

Each environment is made with pip from the package index; everything but Diffusers, Transformers and what they require
in another version is that of this environment.
"""

from __future__ import annotations

import functools
import inspect
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Union, get_origin

import numpy as np
import pytest

import pipelines
from pipelines.common.compatibility import OLDEST_VERSIONS
from tests.support.environments import environment_with
from tests.support.runs import ROOT, environment
from tests.support.tiny_published import PUBLISHED

SCRIPT = ROOT / "tests/support/published.py"
OLDEST = tuple(f"{name}=={version}" for name, version in OLDEST_VERSIONS.items())
ENVIRONMENTS = {
    "oldest": OLDEST,
    "between": ("diffusers==0.36.0", "transformers==5.24.0"),
    "newest": ("diffusers", "transformers"),
}
TOO_OLD = ("diffusers==0.34.0", "transformers==4.55.4")
VERSIONS = "import diffusers, transformers; print(diffusers.__version__, transformers.__version__)"


@pytest.fixture(scope="module")
def python_of(tmp_path_factory) -> Callable[[str], str]:
    """Return a function that makes an environment of ENVIRONMENTS once, and returns its Python."""
    return functools.cache(lambda name: environment_with(tmp_path_factory.mktemp(name), *ENVIRONMENTS[name]))


def isolated(home: Path) -> dict[str, str]:
    return environment(PYTHONPATH="", PYTHONSAFEPATH="", HF_HOME=str(home), HF_HUB_OFFLINE="1")


def outputs(python: str, loader: str, folders: list[Path], here: Path, **variables: str) -> dict[str, np.ndarray]:
    """Return the outputs of all pipelines, drawn by a process with this interpreter."""
    done = subprocess.run(
        [python, SCRIPT, loader, here / "outputs.npz", *folders],
        cwd=here, env={**isolated(here / "cache"), **variables}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "newly initialized" not in done.stderr, "a component has random weights"
    assert "Expected types for" not in done.stderr
    assert "cannot get type annotation" not in done.stderr
    return dict(np.load(here / "outputs.npz"))


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether outputs in [0, 1] are equal up to rounding, which depends on where weights lie in memory; and captions,
    class ids and overlays exactly."""
    if one.dtype.kind == "f" and one.shape == other.shape:
        return bool(np.abs(one - other).max() < 1e-5)
    return np.array_equal(one, other)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> list[Path]:
    """One pipeline folder of each kind."""
    folder = tmp_path_factory.mktemp("published")
    for name, make in PUBLISHED.items():
        make().save_pretrained(folder / name)
    return [folder / name for name in PUBLISHED]


@pytest.fixture(scope="module")
def drawn_here(published, tmp_path_factory) -> dict[str, np.ndarray]:
    here = tmp_path_factory.mktemp("here")
    return outputs(sys.executable, "pipelines.tools.loading", published, here, PYTHONPATH=str(ROOT))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_all_pipelines_draw_the_same_images(name, python_of, published, drawn_here, tmp_path):
    python = python_of(name)
    versions = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, env=isolated(tmp_path))
    if name == "oldest":
        assert versions.stdout.split() == list(OLDEST_VERSIONS.values())
    drawn = outputs(python, "diffusers", published, tmp_path)
    assert drawn.keys() == drawn_here.keys()
    different = [key for key, value in drawn_here.items() if not same(drawn[key], value)]
    assert different == [], f"other outputs with {versions.stdout.strip()}"
    assert all(value.std() > 0 for key, value in drawn.items() if key.endswith("/images")), "a blank image"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_pipelines_behave_in_the_same_way_with_the_oldest_versions(python_of, tmp_path):
    names = ("test_diffusers_users", "test_callbacks", "test_wrong_arguments")
    tests = [f"tests/pipelines/{name}.py" for name in names]
    done = subprocess.run(
        [python_of("oldest"), "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", *tests],
        cwd=ROOT, env={**isolated(tmp_path), "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_older_versions_are_refused_with_the_fix(published, tmp_path):
    python = environment_with(tmp_path / "venv", *TOO_OLD)
    done = subprocess.run(
        [python, SCRIPT, "diffusers", tmp_path / "outputs.npz", published[0]],
        cwd=tmp_path, env=isolated(tmp_path / "cache"), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert (
        "ImportError: this pipeline needs diffusers 0.35.2 and transformers 4.57.1 or later, but diffusers 0.34.0 and "
        "transformers 4.55.4 are installed; run `pip install --upgrade diffusers transformers`"
    ) in done.stderr


# --- what older versions need, without an environment that has them


@pytest.mark.parametrize("name", pipelines.__all__)
def test_annotations_of_pipelines_are_those_that_older_versions_inspect(name):
    """Diffusers 0.35 knows classes and Optional[X], but neither X | None nor annotations that are strings."""
    parameters = list(inspect.signature(getattr(pipelines, name).__init__).parameters.values())[1:]
    for parameter in parameters:
        annotation = parameter.annotation
        assert inspect.isclass(annotation) or get_origin(annotation) is Union, f"{parameter}"
        assert not isinstance(annotation, types.UnionType), f"{parameter}"


@pytest.mark.parametrize("name", ["captioned", "pretrained_text_encoder", "image_caption"])
def test_tokenizers_have_a_class_that_older_versions_have(name, tmp_path):
    PUBLISHED[name]().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    settings = json.loads((tmp_path / "tokenizer/tokenizer_config.json").read_text(encoding="utf-8"))
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(settings.get("extra_special_tokens"), list)


@pytest.mark.parametrize("options", [{}, {"variant": "fp16"}, {"max_shard_size": "2KB"}])
def test_the_weights_of_a_text_encoder_have_the_names_that_older_versions_read(options, tmp_path):
    from safetensors import safe_open

    PUBLISHED["captioned"]().save_pretrained(tmp_path, **options)
    files = sorted((tmp_path / "text_encoder").glob("*.safetensors"))
    assert len(files) > 1 or "max_shard_size" not in options
    names = [name for file in files for name in safe_open(file, "pt").keys()]  # noqa: SIM118
    assert names
    assert all(name.startswith("text_model.") for name in names)
    for index in (tmp_path / "text_encoder").glob("*.index*.json"):
        assert sorted(json.loads(index.read_text(encoding="utf-8"))["weight_map"]) == sorted(names)
