"""What holds for the files themselves: layers, names, what is shipped, and numbers that must not be in code."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SOURCES = [p for folder in ("pipelines", "training", "data_scripts") for p in sorted((ROOT / folder).rglob("*.py"))]


def test_layers_are_kept():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("folder", ["training", "data_scripts", "pipelines"])
def test_no_script_hides_another_module(folder):
    """Running a script puts its folder first on the path: `datasets.py` there would be everybody's `datasets`."""
    installed = set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    own = {"pipelines", "training", "data_scripts", "tests", "__init__"}
    names = {p.stem if p.is_file() else p.name for p in (ROOT / folder).iterdir() if p.suffix in (".py", "")} - own
    assert names & (installed - own) == set()


def imported(path: Path) -> set[str]:
    """Top-level modules that a file imports, wherever in it; relative imports aside."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_pipelines_need_little():
    needed = {"torch", "diffusers", "transformers", "PIL", "numpy", "huggingface_hub", "yaml"}
    allowed = needed | sys.stdlib_module_names
    for path in (ROOT / "pipelines").rglob("*.py"):
        # Its own folder by name only where a script is started as one, beside which nothing relative can be imported.
        own = {"pipelines"} if "__main__" in path.read_text() else set()
        assert imported(path) - allowed - own == set(), path.name


def test_training_scripts_do_not_import_each_other():
    for path in (ROOT / "training").glob("train_*.py"):
        others = re.findall(r"^\s*(?:from|import)\s+(?:training)?\.?(train_\w+)", path.read_text(), re.MULTILINE)
        assert others == [], path.name


def test_scaling_factors_are_read_never_written_down():
    """SDXL's and SD's numbers, and FLUX's and SD3's, belong in a VAE's config."""
    constants = {0.13025, 0.18215, 0.3611, 1.5305, 0.1159, 0.0609}
    for path in SOURCES:
        numbers = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert not {n for n in numbers if isinstance(n, float)} & constants, path.name


def test_slow_libraries_are_imported_where_they_are_used():
    """`--help` and a mistyped flag are answered in two seconds: nothing at the top of what scripts import is slow."""
    slow = {"diffusers", "transformers", "datasets", "wandb", "matplotlib", "huggingface_hub", "accelerate"}
    for script in sorted((ROOT / "training").glob("train_*.py")):
        code = f"import sys; sys.path.insert(0, '.'); import training.{script.stem}; print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert slow & {name.split(".")[0] for name in done.stdout.split()} == set(), script.name


def test_files_and_functions_stay_small():
    for path in SOURCES:
        text = path.read_text()
        # The loop is one class, longer than a file should be.
        assert len(text.splitlines()) <= (490 if path.name == "loop.py" else 450), path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"
