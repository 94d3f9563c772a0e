"""Commands and links in README.md, CONTRIBUTING.md and docs/: scripts exist, flags parse, the walkthrough runs."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from halftone_trainer.__main__ import choose, find_scripts
from pipelines.tools.cli import UserError
from pipelines.tools.resources import PRESETS, find_shipped
from tests.repository.test_site import generate_reference

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "configs").rglob("*.md")),
]
TYPED, NOT_TYPED = {"bash", "powershell"}, {"json", "yaml", "python", ""}  # languages of blocks
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LANGUAGE = re.compile(r"^```(\w*)$", re.MULTILINE)
LOOP = re.compile(r"^for f in (\S+); do (.*?); done$", re.MULTILINE)
# Programs of other projects that the documents may use.
PROGRAMS = ("python", "accelerate", "torchrun", "halftone", "make")
FOREIGN = {"source", "hf", "wandb", "pip", "apt", "cd", "tensorboard", "trackio", "kill", "git", "export"}
# The flags that the walkthrough adds to a command for images without captions.
SOURCE = re.compile(r"--(?:train_data_dir|dataset_name)[= ](\S+)")
TINY = {
    "train_tokenizer": [],
    "check_dataset": [],
    "train_autoencoder": ["--max_train_steps", "6", "--report_to", "none", "--cpu_threads", "1"],
    "precompute_latents": ["--cpu_threads", "1"],
    "train_latent_diffusion": (
        ["--max_train_steps", "4", "--report_to", "none", "--cpu_threads", "1", "--train_batch_size", "8"]
        + ["--transformer.hidden_size", "32", "--transformer.num_layers", "1", "--preview_inference_steps", "2"]
    ),
    "sample": ["--num_images", "2", "--num_inference_steps", "2"],
}


def blocks(document: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(document.read_text(encoding="utf-8")) if kind == language]


def commands(text: str) -> list[list[str]]:
    """Split a shell block into commands, and each command into words; comments are left out.

    `for f in PATTERN; do COMMAND $f; done` becomes the command with the first file.
    """
    text = LOOP.sub(lambda loop: loop[2].replace("$f", str(sorted(ROOT.glob(loop[1]))[0].relative_to(ROOT))), text)
    lines = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    return [_without_variables(words) for words in lines if words]


def _without_variables(words: list[str]) -> list[str]:
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return words


def script_and_flags(words: list[str]) -> tuple[str, list[str]] | None:
    """Return the script of this project that a command starts, and its flags; None for other commands."""
    if words[0] == "halftone":
        scripts = find_scripts()
        chosen, flags = choose(words[1:], scripts)
        assert chosen is not None
        return str(scripts[chosen].relative_to(ROOT)), flags
    if words[:3] == ["srun", "bash", "-c"]:
        return script_and_flags(_without_variables(shlex.split(words[3])))
    if "-m" in words:
        module, *flags = words[words.index("-m") + 1 :]
        return f"{module.replace('.', '/')}.py", flags
    for position, word in enumerate(words):
        if word.endswith(".py"):
            return word, words[position + 1 :]
    return None


def inline_commands(document: Path) -> list[list[str]]:
    """Return the commands in the sentences of a document; not those that only name a program or have a gap (…, X)."""
    if document.name == "LOG.md":  # commands of earlier versions
        return []
    spans = re.findall(r"`([^`]+)`", FENCE.sub("", document.read_text(encoding="utf-8")))
    found = [shlex.split(span) for span in spans if span.startswith(tuple(f"{name} " for name in PROGRAMS))]
    complete = [words for words in found if not re.search(r"…|\b[A-Z]+$|_x\b", " ".join(words))]
    return [words for words in complete if words[0] == "make" or script_and_flags_of(words)]


def on_windows(block: str) -> list[list[str]]:
    """Return the commands of a PowerShell block that start a script of this project."""
    return [line.split() for line in block.splitlines() if line.startswith("python ")]


def script_and_flags_of(words: list[str]) -> bool:
    """Return whether a command starts a script of this project, rather than `accelerate launch` alone."""
    return words[0] == "halftone" and len(words) > 2 or words[0] != "halftone" and script_and_flags(words) is not None


def docstring_commands(script: Path) -> list[list[str]]:
    """Return the commands in the description of a script, which `--help` shows."""
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    typed = [line.strip() for line in lines if line.startswith("    ") and line.split()[0] in PROGRAMS]
    return [words for line in typed for words in commands(line)]


EVERY = [
    pytest.param(words, id=f"{source.name}: {' '.join(words)[:70]}")
    for source, found in [
        *((document, [w for block in blocks(document, "bash") for w in commands(block)]) for document in DOCUMENTS),
        *((document, inline_commands(document)) for document in DOCUMENTS),
        *(
            (document, [w for block in blocks(document, "powershell") for w in on_windows(block)])
            for document in DOCUMENTS
        ),
        *((script, docstring_commands(script)) for script in find_scripts().values()),
    ]
    for words in found
]


def test_no_commands_are_in_blocks_of_another_kind() -> None:
    languages = {language for document in DOCUMENTS for language in LANGUAGE.findall(document.read_text("utf-8"))}
    assert languages <= TYPED | NOT_TYPED
    assert "" not in {language for document in DOCUMENTS for language, _ in FENCE.findall(document.read_text("utf-8"))}


def test_commands_of_every_kind_were_collected() -> None:
    first = [words.values[0][0] for words in EVERY]
    assert {"python", "accelerate", "halftone", "make", "torchrun", "srun"} <= set(first)
    assert len(EVERY) > 150


class _Parsed(Exception):
    """Raised after the flags have been accepted, so that the script does not run."""


@pytest.mark.parametrize("words", EVERY)
def test_commands_parse(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "make":
        target, *variables = words[1:]
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE)
        for variable in variables:
            assert re.search(rf"\b{variable.split('=')[0]}\b", makefile)
    elif words[1:3] == ["-m", "venv"]:
        assert words[3] == ".venv"
    elif words[:3] == ["python", "-m", "pytest"]:
        assert (ROOT / words[3]).is_file()
    elif words[:3] == ["python", "-m", "tests.faults"]:
        assert words[3:] == ["--list"]
    elif words[0] == "bash":
        assert (ROOT / words[1]).is_file()
    elif words[:2] == ["halftone", "path"]:
        assert find_shipped(words[2], [PRESETS]).is_file()
    elif (started := script_and_flags(words)) is None:
        assert words[0] in FOREIGN
    else:
        _launcher_exists(words)
        script, flags = started
        assert (ROOT / script).is_file()
        # In another folder: the contents of data/ and runs/ in the checkout must not matter.
        (tmp_path / "configs").symlink_to(ROOT / "configs")
        monkeypatch.chdir(tmp_path)
        if "--config" not in flags:  # settings are then chosen for the images, which therefore must exist
            for folder in SOURCE.findall(shlex.join(flags)):
                draw_captioned_images(tmp_path / folder, number=8)
        _parse(script, flags, monkeypatch)


def _launcher_exists(words: list[str]) -> None:
    assert words[0] in ("python", "accelerate", "torchrun", "srun", "halftone")
    if "--config_file" in words and not words[words.index("--config_file") + 1].startswith("$("):
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()


def _parse(script: str, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if hasattr(module, "parse_arguments"):
        module.parse_arguments(flags)
        return
    real = module.parse_config

    def only_parse(*arguments, **options):
        real(*arguments, **options)
        raise _Parsed

    monkeypatch.setattr(module, "parse_config", only_parse)
    with pytest.raises(_Parsed):
        module.main(flags)


def test_a_wrong_flag_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="learning_rate"):
        _parse("training/train_autoencoder.py", ["--learning_rte", "1e-3"], monkeypatch)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_resolve(document: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        if any((document.parent / path) == ROOT / "docs" / page for page in generate_reference.PAGES):
            continue  # made when the site is built
        target = document.parent / path if path else document
        assert target.exists(), f"{document.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{document.name}: {link}"


def anchors(document: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_python_blocks_compile() -> None:
    sources = [block for document in DOCUMENTS for block in blocks(document, "python")]
    assert sources
    for source in sources:
        compile(source, "README.md", "exec")


def section(title: str) -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def draw_captioned_images(folder: Path, number: int = 60) -> None:
    """Draw circles and squares, with their captions in metadata.jsonl."""
    folder.mkdir(parents=True)
    lines = []
    for i in range(number):
        colour, shape = ("red", "blue", "green")[i % 3], ("circle", "square")[i % 2]
        image = Image.new("RGB", (72 + i, 80), "white")
        draw = ImageDraw.Draw(image)
        (draw.ellipse if shape == "circle" else draw.rectangle)((10, 10, 50 + i % 9, 50 + i % 9), fill=colour)
        image.save(folder / f"{i:04d}.png")
        lines.append(json.dumps({"file_name": f"{i:04d}.png", "text": f"a {colour} {shape}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def draw_classes(folder: Path, number: int = 60) -> None:
    """Draw images without captions, in one subfolder for each class."""
    for i in range(number):
        colour = ("red", "blue", "green")[i % 3]
        (folder / colour).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64 + i), colour).save(folder / colour / f"{i}.png")


def type_it(words: list[str], folder: Path, extra: list[str]) -> None:
    """Run one command of a document in `folder`, with flags that make it tiny."""
    script, flags = script_and_flags(words) or ("", [])
    launcher = ["-m", "accelerate.commands.launch"] if words[0] == "accelerate" else []
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / script), *flags, *extra],
        cwd=folder, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def walk(shell: str, folder: Path, extra: list[str] | None = None) -> None:
    for words in commands(shell):
        script, _ = script_and_flags(words) or ("", [])
        type_it(words, folder, TINY[Path(script).stem] + (extra or []))


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return tmp_path


@pytest.mark.slow
def test_walkthrough_with_captions(workplace: Path) -> None:
    draw_captioned_images(workplace / "my_images")
    first, check = (body for kind, body in FENCE.findall(section("Your own images")) if kind == "bash")
    assert len(commands(first)) == 3
    walk(check, workplace)
    walk(first, workplace)
    assert (workplace / "grid.png").is_file()
    run = workplace / "runs/my_images/latent_diffusion_64_caption"
    assert (run / "pipeline/README.md").is_file()
    assert (run / "training_curves.png").is_file()
    assert list((run / "samples").glob("*.png"))
    _friend_loads(run / "pipeline", workplace)
    extra_epochs = next(body for kind, body in FENCE.findall(section("Stop and resume")) if kind == "bash")
    walk(extra_epochs.replace("--extra_epochs 20", "--extra_epochs 1"), workplace)
    assert json.loads((run / "record.json").read_text(encoding="utf-8"))["steps"] > 4


def _friend_loads(pipeline: Path, folder: Path) -> None:
    """Run the Python example of the README with a local folder instead of a Hub id."""
    source = blocks(ROOT / "README.md", "python")[0].replace("you/your-model", str(pipeline))
    done = subprocess.run([sys.executable, "-c", source], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert Image.open(folder / "image.png").size == (64, 64)


@pytest.mark.slow
def test_walkthrough_without_captions(workplace: Path) -> None:
    """Models with classes and without conditions share the autoencoder and the latents of the images."""
    draw_classes(workplace / "my_images")
    command = "python training/train_latent_diffusion.py --train_data_dir my_images"
    walk(f"{command} --dry_run", workplace)
    assert not (workplace / "runs").exists()
    runs = workplace / "runs/my_images"
    tiny = ["--model.block_out_channels", "[32,64]", "--model.layers_per_block", "1"]  # which only a U-Net has
    walk(command, workplace, tiny)
    shared = [runs / "autoencoder_64/pipeline/model_index.json", runs / "latents_64/cache.json"]
    made = [file.stat().st_mtime_ns for file in shared]
    walk(f"{command} --condition_on none", workplace, tiny)
    assert [file.stat().st_mtime_ns for file in shared] == made
    sample = f"python pipelines/sample.py --model {runs.relative_to(workplace)}/latent_diffusion_64_"
    walk(f"{sample}label --class_label green --output label.png", workplace)
    walk(f"{sample}unconditional --output nothing.png", workplace)
    assert (workplace / "label.png").is_file()
    assert (workplace / "nothing.png").is_file()
