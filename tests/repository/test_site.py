"""The documentation site: its reference has every flag of every command, and its links lead to pages."""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

from halftone_trainer.__main__ import find_scripts
from tests.conftest import ROOT
from training.core.parsing import known_names

sys.path.insert(0, str(ROOT / "docs"))
import generate_reference
from site_hooks import with_links_of_the_site

SCRIPTS = [path.relative_to(ROOT).as_posix() for path in generate_reference.scripts()]


def config_of(script: str, module: ModuleType) -> type | None:
    """Return the class of a script's flags, which its `main` passes to `parse_config`; None if it uses argparse."""
    if hasattr(module, "parse_arguments"):
        return None
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    calls = [node for node in ast.walk(main) if isinstance(node, ast.Call) and ast.unparse(node.func) == "parse_config"]
    return getattr(module, ast.unparse(calls[0].args[0]))


def parser_of(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """Return the parser that a script makes in `parse_arguments`."""
    parsers: list[argparse.ArgumentParser] = []

    def keep(parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        parsers.append(parser)
        raise _Kept

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", keep)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", keep)
    with pytest.raises(_Kept):
        module.parse_arguments([])
    return parsers[0]


class _Kept(Exception):
    """Raised when a parser has been kept, so that nothing is parsed."""


def test_every_command_is_in_the_reference():
    files = [file for folder in ("training", "pipelines", "data_scripts") for file in (ROOT / folder).rglob("*.py")]
    texts = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}
    started = {name for name, text in texts.items() if re.search(r"^if __name__ == .__main__.:$", text, re.MULTILINE)}
    assert started == set(SCRIPTS)
    assert {path.relative_to(ROOT).as_posix() for path in find_scripts().values()} <= set(SCRIPTS)
    assert {"training/benchmarks/pixels.py", "training/hpc/submit.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_in_the_reference(script, monkeypatch):
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    command = generate_reference.read_help(script, generate_reference.help_of(ROOT / script))
    listed = [flag for flags in command.groups.values() for flag in flags]
    shown = {name for flag in listed for name in re.findall(r"(?<![\w-])--\w[\w.]*", flag.names)}
    config = config_of(script, module)
    if config is not None:
        expected = {f"--{name}" for name in known_names(config)}
    else:
        actions = parser_of(module, monkeypatch)._actions
        expected = {action.option_strings[-1] for action in actions if action.option_strings}
        positional = {action.metavar or action.dest for action in actions if not action.option_strings}
        assert {flag.names for flag in command.groups.get(generate_reference.POSITIONAL, [])} == positional
    assert expected
    assert expected - shown == set()
    assert command.description.startswith((module.__doc__ or "").splitlines()[0])
    assert [flag.names for flag in listed if not flag.help] == []


def test_texts_of_the_program_are_not_read_as_markdown():
    flag = generate_reference.Flag("--a_b NAME", "a | b, *c*, <d> and [e](f)")
    page = generate_reference.page_of(generate_reference.Command("x.py", "", {"Options": [flag]}))
    assert "| `--a_b NAME` | a \\| b, \\*c\\*, &lt;d&gt; and \\[e\\](f) |" in page


@pytest.mark.parametrize(
    ("link", "source", "page", "expected"),
    [
        ("[a](data.md#b)", "docs/runs.md", "runs.md", "[a](data.md#b)"),
        ("[a](../README.md#b)", "docs/runs.md", "runs.md", "[a](readme.md#b)"),
        ("[a](../../README.md)", "docs/design/x.md", "design/x.md", "[a](../readme.md)"),
        ("[a](docs/runs.md)", "README.md", "readme.md", "[a](runs.md)"),
        ("![a](docs/images/b.png)", "README.md", "readme.md", "![a](images/b.png)"),
        ("[a](LICENSE)", "README.md", "readme.md", "a"),
        ("[a](https://b.c/d.md)", "README.md", "readme.md", "[a](https://b.c/d.md)"),
    ],
)
def test_links_lead_to_pages_of_the_site(link, source, page, expected):
    assert with_links_of_the_site(link, source, page) == expected


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    """Every link and every anchor has a target, and every docstring of the reference is read."""
    quiet = {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, **quiet},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site/reference/commands/index.html").read_text(encoding="utf-8")
    assert all(f">{script}<" in page for script in SCRIPTS)
    classes = (tmp_path / "site/reference/python/index.html").read_text(encoding="utf-8")
    assert "guidance_scale" in classes
    guides = {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    missing = [guide for guide in guides if guide != Path("index") and not (tmp_path / "site" / guide).is_dir()]
    assert missing == []
