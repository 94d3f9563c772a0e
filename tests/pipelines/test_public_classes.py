"""`from pipelines import …` offers every public class, and imports it on first access."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import pipelines
from tests.conftest import ROOT

PACKAGE = Path(pipelines.__file__).parent


def classes_in(path: Path) -> list[str]:
    names = [node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    return [name for name in names if name.endswith("Pipeline")]


def test_every_public_pipeline_is_offered():
    defined = {name: path.stem for path in PACKAGE.glob("*.py") for name in classes_in(path)}
    assert sorted(defined) == pipelines.__all__
    for name, module in defined.items():
        offered = getattr(pipelines, name)
        assert offered.__name__ == name
        assert offered.__module__ == f"pipelines.{module}"
    assert set(pipelines.__all__) <= set(dir(pipelines))


def test_type_checkers_see_the_same_classes():
    """Type checkers read the imports under TYPE_CHECKING."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert seen == {name: getattr(pipelines, name).__module__.rpartition(".")[2] for name in pipelines.__all__}


def test_other_names_are_unknown():
    with pytest.raises(AttributeError, match="module 'pipelines' has no attribute 'LatentPipeline'"):
        _ = pipelines.LatentPipeline


def test_importing_the_package_imports_nothing_slow():
    code = """
import json, sys
import pipelines
before = sorted(sys.modules)
from pipelines import LatentDiffusionPipeline
print(json.dumps([before, LatentDiffusionPipeline.__module__, "torch" in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    before, module, has_torch = json.loads(done.stdout)
    assert {name.partition(".")[0] for name in before} & {"torch", "diffusers", "transformers", "numpy", "PIL"} == set()
    assert module == "pipelines.latent_diffusion"
    assert has_torch
