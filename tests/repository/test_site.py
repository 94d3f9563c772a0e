"""The documentation site: its reference has every flag of every command, and its links lead to pages."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from training.core.parsing import known_names

sys.path.insert(0, str(ROOT / "docs"))
import generate_reference
from site_hooks import with_links_of_the_site

CONFIGS = {
    "training/train_autoencoder.py": "Config",
    "training/train_latent_diffusion.py": "Config",
    "training/train_controlnet.py": "Config",
    "training/train_decoder.py": "Config",
    "training/finetune_decoder.py": "Config",
    "training/train_image_caption.py": "Config",
    "training/evaluate.py": "EvaluationConfig",
}


@pytest.mark.parametrize("script", CONFIGS)
def test_every_option_is_in_the_reference(script):
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    command = generate_reference.read_help(script, generate_reference.help_of(ROOT / script))
    flags = {flag.names.split()[0].rstrip(",") for flags in command.groups.values() for flag in flags}
    options = {f"--{name}" for name in known_names(getattr(module, CONFIGS[script]))}
    assert options - flags == set()
    assert command.description.startswith((module.__doc__ or "").splitlines()[0])
    assert all(flag.help for flags in command.groups.values() for flag in flags)


def test_the_flags_of_a_command_without_a_config_are_in_the_reference():
    script = "pipelines/sample.py"
    text = generate_reference.help_of(ROOT / script)
    command = generate_reference.read_help(script, text)
    flags = {re.split("[ ,]", flag.names)[0] for flags in command.groups.values() for flag in flags}
    assert set(re.findall(r"^  (--\w+)", text, re.MULTILINE)) == flags - {"-h"}
    assert {"--prompt", "--brief", "--control_image"} <= flags


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
    scripts = [path.relative_to(ROOT).as_posix() for path in generate_reference.scripts()]
    assert len(scripts) > 20
    assert all(f">{script}<" in page for script in scripts)
    classes = (tmp_path / "site/reference/python/index.html").read_text(encoding="utf-8")
    assert "guidance_scale" in classes
    guides = {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    missing = [guide for guide in guides if guide != Path("index") and not (tmp_path / "site" / guide).is_dir()]
    assert missing == []
