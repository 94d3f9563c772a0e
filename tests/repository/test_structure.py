"""Rules for the source files: layers, names, allowed imports, sizes, and constants that must not be in them."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from training.core.scripts import script_path, stage_names

PACKAGES = ("pipelines", "training", "data_scripts", "halftone_trainer")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
SCRIPTS = [path for path in SOURCES if '__name__ == "__main__"' in path.read_text()]
FOLDERS_OF_SCRIPTS = sorted({path.parent.relative_to(ROOT).as_posix() for path in SCRIPTS})
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "configs").rglob("*.*")]


def test_layers_are_kept():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_folders_of_scripts_are_found():
    assert {"training", "training/benchmarks", "data_scripts", "pipelines"} <= set(FOLDERS_OF_SCRIPTS)


@pytest.mark.parametrize("folder", FOLDERS_OF_SCRIPTS)
def test_no_script_hides_another_module(folder):
    """A script's folder comes first on `sys.path`, so a `datasets.py` there would hide the library `datasets`."""
    installed = set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    own = {*PACKAGES, "tests", "__init__"}
    names = {p.stem if p.is_file() else p.name for p in (ROOT / folder).iterdir() if p.suffix in (".py", "")} - own
    assert names & (installed - own) == set()


def test_the_top_of_training_contains_only_commands():
    files = {path.name for path in (ROOT / "training").glob("*.py")}
    commands = {path.name for path in SCRIPTS if path.parent == ROOT / "training"}
    assert files - commands == {"__init__.py", "api.py"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def executed_on_import(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the import statements that run on import: not those inside functions or under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from executed_on_import([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            parts = [node.body, *(handler.body for handler in node.handlers), node.orelse, node.finalbody]
            yield from executed_on_import([statement for part in parts for statement in part])
        elif isinstance(node, (ast.With, ast.ClassDef)):
            yield from executed_on_import(node.body)


def modules_needed(path: Path, source: str, known: set[str]) -> set[str]:
    """Return the modules among `known` that are imported when the module with this source is imported."""
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    needed = set()
    for node in executed_on_import(ast.parse(source).body):
        if isinstance(node, ast.Import):
            needed |= {alias.name for alias in node.names}
            continue
        above = package[: len(package) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        needed |= {name if (name := f"{base}.{alias.name}") in known else base for alias in node.names}
    return needed & known


def test_there_are_no_circular_imports():
    known = {module_name(path) for path in SOURCES}
    graph = {module_name(path): modules_needed(path, path.read_text(), known) for path in SOURCES}
    assert sum(len(needed) for needed in graph.values()) > 300
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_modules_needed_are_recognised():
    known = {"training.core.stage", "training.core.layout", "training.core.draws", "training.core.files"}
    source = """
from . import stage
if TYPE_CHECKING:
    from training.core.draws import Draws
else:
    import training.core.layout
def f():
    import training.core.files
"""
    path = ROOT / "training/core/draws.py"
    assert modules_needed(path, source, known) == {"training.core.stage"}
    assert modules_needed(path, source.replace("if TYPE_CHECKING", "if sys"), known) == known - {"training.core.files"}
    assert modules_needed(path, "from .layout import BatchLayout", known) == {"training.core.layout"}


def imported(path: Path) -> set[str]:
    """Return the top-level modules that a file imports anywhere, without relative imports."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            modules.add(node.module.split(".")[0])
    return modules


def test_pipelines_import_few_libraries():
    needed = {"torch", "diffusers", "transformers", "PIL", "numpy", "huggingface_hub", "safetensors", "yaml"} | {
        "psutil",
        "tqdm",
    }
    optional = {"peft", "pillow_heif", "onnxruntime", "tokenizers"}
    allowed = needed | optional | sys.stdlib_module_names
    for path in (ROOT / "pipelines").rglob("*.py"):
        # Only scripts may import `pipelines` by name: a file that is run as a script cannot use relative imports.
        own = {"pipelines"} if "__main__" in path.read_text() else set()
        if path.name == "demo.py" or path.parent.name == "studio":
            own |= {"gradio", "pandas", "matplotlib"}  # of the extra `demo`; Gradio requires pandas
        assert imported(path) - allowed - own == set(), path.name


def test_training_scripts_do_not_import_each_other():
    pattern = r"^\s*(?:from|import)\s+(?:training)?\.?((?:train|distill|finetune)_\w+)"
    for path in map(script_path, stage_names()):
        others = re.findall(pattern, path.read_text(), re.MULTILINE)
        assert others == [], path.name


def test_scaling_factors_are_read_from_configs():
    """The scaling and shift factors of SDXL, SD, FLUX and SD3 belong in the config of a VAE, not in code."""
    constants = {0.13025, 0.18215, 0.3611, 1.5305, 0.1159, 0.0609}
    for path in SOURCES:
        numbers = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert not {n for n in numbers if isinstance(n, float)} & constants, path.name


def test_slow_libraries_are_imported_where_they_are_used():
    """Importing a training script imports no slow library, so `--help` and errors appear within two seconds."""
    slow = {"diffusers", "transformers", "datasets", "wandb", "matplotlib", "huggingface_hub", "accelerate"}
    code = "import importlib, sys; sys.path.insert(0, '.')\n"
    for script in map(script_path, stage_names()):
        code += f"importlib.import_module('training.{script.stem}'); print('{script.name}', *sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        script_name, *modules = line.split()
        assert slow & {name.split(".")[0] for name in modules} == set(), script_name
    assert len(done.stdout.splitlines()) == len(stage_names())


def test_files_and_functions_stay_small():
    for path in SOURCES:
        text = path.read_text()
        assert len(text.splitlines()) <= 450, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"


def test_paths_named_in_code_exist():
    """Commands, messages and docstrings must name the current path of a script."""
    pattern = re.compile(
        rf"\b(?:{'|'.join((*PACKAGES, 'configs', 'model_cards', 'docs'))})/[a-z0-9_/.]+\.(?:py|yaml|md|jinja)\b"
    )
    seen = set()
    for path in SOURCES:
        strings = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
        named = {name for text in strings if isinstance(text, str) for name in pattern.findall(text)}
        assert {name for name in named if not (ROOT / name).is_file()} == set(), path
        seen |= named
    assert len(seen) > 30


def test_install_commands_use_our_distribution_name():
    """The package `halftone` on the package index is another project."""
    pattern = re.compile(r"pip install[^\n]*\bhalftone\b(?!-trainer|_trainer)")
    assert pattern.search("pip install 'halftone[cuda]'")
    assert not pattern.search("pip install halftone-trainer")
    for path in [*SOURCES, *DOCUMENTS]:
        assert not pattern.search(path.read_text()), path
