"""Text files are UTF-8 in every locale, and a command can print every character."""

from __future__ import annotations

import ast
import codecs
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from pipelines.common.design_brief import DesignBrief
from pipelines.tools.cli import UserError
from pipelines.tools.resources import find_file, shipped_files, shipped_path
from tests.conftest import ROOT
from tests.support.runs import TOY, environment
from training.experiments.registry import read_config_file
from training.reporting import curves
from training.run.folder import RunFolder
from training.run.metrics_log import read_metrics

# A locale without UTF-8. Python would replace the C locale by a UTF-8 one, which the two variables prevent.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
CP1252 = {"PYTHONIOENCODING": "cp1252"}
TEXT = "café → 海报 × 포스터"
PACKAGES = ("pipelines", "training", "data_scripts", "halftone_trainer")
SOURCES = [ROOT / "setup.py", *(path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))]


def python(*words: str | Path, **variables: str) -> bytes:
    """Run Python with these environment variables and return its output."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=environment(**variables), capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


def as_notepad_saves_it(path: Path) -> None:
    """Give a text file a byte order mark and the line ends of Windows."""
    text = path.read_text(encoding="utf-8")
    assert not text.startswith("\ufeff")
    path.write_text(text, encoding="utf-8-sig", newline="\r\n")


def test_the_locale_of_these_tests_is_not_utf8():
    code = "import locale, sys; print(locale.getpreferredencoding(False), sys.stdout.encoding)"
    for name in python("-c", code, **ASCII).decode().split():
        assert codecs.lookup(name).name == "ascii"
    assert python("-c", code, **CP1252).decode().split()[1] == "cp1252"


def test_shipped_files_are_utf8():
    texts = [shipped_path(name).read_bytes().decode("utf-8") for name in shipped_files()]
    assert any(not text.isascii() for text in texts)
    assert not any(text.startswith("\ufeff") for text in texts)


def calls_without_encoding(source: str) -> list[str]:
    """Return the calls that open a text file in the encoding of the locale.

    Ruff's PLW1514 has the same purpose, but overlooks methods of objects whose type it cannot infer.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg in ("encoding", None) for keyword in node.keywords):
            continue
        owner, _, name = ast.unparse(node.func).rpartition(".")
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        modes = {argument.value for argument in arguments if isinstance(argument, ast.Constant)}
        is_binary = any(isinstance(mode, str) and set(mode) <= set("rwaxb+") and "b" in mode for mode in modes)
        # Pillow's images, the plan of the quickstart, and `os` have an `open` of another kind.
        opens = name in ("open", "fdopen") and not owner.endswith(("Image", "Plan")) and (owner, name) != ("os", "open")
        is_temporary = name in ("NamedTemporaryFile", "TemporaryFile") and modes & {"w", "w+", "a"}
        is_text = owner and name in ("read_text", "write_text", "FileHandler")
        if is_text or is_temporary or (opens and not is_binary):
            found.append(ast.unparse(node))
    return found


def test_every_text_file_is_opened_with_an_encoding():
    wrong = ["open(p)", "self.file.read_text()", "p.open('a')", "write().write_text('x')", "os.fdopen(f, 'w')"]
    wrong += ["logging.FileHandler(p)", "tempfile.NamedTemporaryFile('w')"]
    assert [call for call in wrong if not calls_without_encoding(call)] == []
    right = ["open(p, 'rb')", "p.open(mode='ab')", "Image.open(p)", "p.read_text(encoding='utf-8')", "read_text(p)"]
    assert [call for call in right if calls_without_encoding(call)] == []
    found = {path.relative_to(ROOT).as_posix(): calls_without_encoding(path.read_text("utf-8")) for path in SOURCES}
    assert {path: calls for path, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    ("variables", "printed"),
    [(ASCII, b"? ? ? ?"), (CP1252, b"? \xd7 \x85 ?"), ({"PYTHONIOENCODING": "utf-8"}, "→ × … 海".encode())],
)
def test_characters_that_the_terminal_lacks_are_replaced(variables, printed):
    code = f"from pipelines.tools.cli import entry_point; entry_point(lambda: print({ascii('→ × … 海')}))"
    assert python("-c", code, **variables).strip() == printed


@pytest.mark.parametrize("variables", [ASCII, CP1252])
def test_the_overview(variables):
    overview = python("-m", "halftone_trainer", **variables)
    assert b"train latent_diffusion" in overview
    assert b"quickstart" in overview


def test_a_preset_with_comments_beyond_ascii():
    name = "autoencoder/emoji_64"
    preset = find_file(name)
    assert not preset.read_text(encoding="utf-8").isascii()
    printed = python("training/train_autoencoder.py", "--config", name, "--print_config", **ASCII)
    assert yaml.safe_load(printed)["output_dir"] == read_config_file(preset)["output_dir"]


def test_captions_beyond_ascii(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images/a.png")
    record = {"file_name": "a.png", "caption": f"{TEXT}\u2028second line"}
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text(f"{json.dumps(record, ensure_ascii=False)}\n" * 2, encoding="utf-8")
    as_notepad_saves_it(metadata)
    flags = ("--image_dir", tmp_path / "images", "--output_dir", tmp_path / "out")
    python("data_scripts/import_captions.py", metadata, *flags, **ASCII)
    written = (tmp_path / "out/metadata.jsonl").read_bytes().decode("utf-8")
    assert json.loads(written) == {"file_name": "a.png", "text": f"{TEXT} second line"}
    assert TEXT in written


@pytest.mark.slow
def test_a_run_and_its_resume(tmp_path):
    """A run's files have a name beyond ASCII in them; before the resume, editors change config.yaml and metrics.csv."""
    folder = RunFolder(tmp_path / "run")
    config = tmp_path / "toy.yaml"
    settings = {"output_dir": str(folder.path), "run_name": TEXT, "num_samples": 8, "train_batch_size": 4}
    settings |= {"report_to": "none", "cpu_threads": 1, "logging_steps": 1, "num_train_epochs": 1}
    config.write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    as_notepad_saves_it(config)
    python(TOY, "--config", config, **ASCII)
    assert f"run_name: {TEXT}\n".encode() in folder.config_file.read_bytes()
    assert TEXT.encode() in (folder.pipeline / "README.md").read_bytes()
    steps = [row["step"] for row in read_metrics(folder.metrics_file)]
    assert len(steps) == 2

    as_notepad_saves_it(folder.config_file)
    folder.metrics_file.write_bytes(codecs.BOM_UTF8 + folder.metrics_file.read_bytes())
    assert [*map(list, curves.read_metrics(folder.metrics_file)["images_seen"])] == [[1, 2], [4, 8]]
    python(TOY, "--config", config, "--num_train_epochs", "2", **ASCII)
    resumed = [row["step"] for row in read_metrics(folder.metrics_file)]
    assert resumed[:2] == steps
    assert len(resumed) == 4
    assert folder.saved_config()["run_name"] == TEXT


def test_configs_and_briefs_that_an_editor_saved(tmp_path):
    config, brief = tmp_path / "config.yaml", tmp_path / "brief.yaml"
    config.write_text(f"run_name: {TEXT}\nseed: 3\n", encoding="utf-8")
    brief.write_text("# 海报\nstyle: swiss\n", encoding="utf-8")
    plain = DesignBrief.from_yaml(brief)
    for file in (config, brief):
        as_notepad_saves_it(file)
    assert read_config_file(config) == {"run_name": TEXT, "seed": 3}
    assert DesignBrief.from_yaml(brief) == plain


def test_a_config_in_another_encoding_is_refused(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("run_name: 海报\n", encoding="gbk")
    with pytest.raises(UserError, match="config.yaml is not UTF-8 .*save it as UTF-8"):
        read_config_file(config)
