"""What holds for the files themselves: layers, names, what is shipped, and numbers that must not be in code."""

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
    assert {"training", "training/evaluation", "training/benchmarks", "data_scripts", "pipelines"} <= set(
        FOLDERS_OF_SCRIPTS
    )


@pytest.mark.parametrize("folder", FOLDERS_OF_SCRIPTS)
def test_no_script_hides_another_module(folder):
    """Running a script puts its folder first on the path: `datasets.py` there would be everybody's `datasets`."""
    installed = set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    own = {*PACKAGES, "tests", "__init__"}
    names = {p.stem if p.is_file() else p.name for p in (ROOT / folder).iterdir() if p.suffix in (".py", "")} - own
    assert names & (installed - own) == set()


def test_the_top_of_training_holds_commands_alone():
    files = {path.name for path in (ROOT / "training").glob("*.py")}
    commands = {path.name for path in SCRIPTS if path.parent == ROOT / "training"}
    assert files - commands == {"__init__.py", "api.py"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def executed_on_import(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements that run when a module is imported: not those of functions, or for type checkers alone."""
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
    """The modules among `known` whose import the module of this source begins with."""
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


def test_modules_do_not_import_each_other_in_circles():
    known = {module_name(path) for path in SOURCES}
    graph = {module_name(path): modules_needed(path, path.read_text(), known) for path in SOURCES}
    assert sum(len(needed) for needed in graph.values()) > 300
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_a_circle_would_be_found():
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
        assert len(text.splitlines()) <= 450, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"


def test_paths_that_code_names_are_there():
    """A script that moved takes its name along in commands, messages and docstrings."""
    pattern = re.compile(
        rf"\b(?:{'|'.join((*PACKAGES, 'configs', 'model_cards', 'docs'))})/[a-z0-9_/.]+\.(?:py|yaml|md|jinja)\b"
    )
    found = set()
    for path in SOURCES:
        strings = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
        named = {name for text in strings if isinstance(text, str) for name in pattern.findall(text)}
        assert {name for name in named if not (ROOT / name).is_file()} == set(), path
        found |= named
    assert len(found) > 30


def test_nobody_is_sent_to_the_package_of_that_name_on_the_index():
    """`halftone` on the package index is not ours."""
    pattern = re.compile(r"pip install[^\n]*\bhalftone\b(?!-trainer|_trainer)")
    assert pattern.search("pip install 'halftone[cuda]'")
    assert not pattern.search("pip install halftone-trainer")
    for path in [*SOURCES, *DOCUMENTS]:
        assert not pattern.search(path.read_text()), path
