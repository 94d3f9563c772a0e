"""Pages of the documentation site that are made when it is built: all commands with all flags, and all public classes.

mkdocs-gen-files runs this file (`make docs`). The flags come from the commands' own help, and so from the dataclasses
of their options.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]  # of this checkout, wherever the package is installed from

from site_hooks import OUTSIDE, with_links_of_the_site  # noqa: E402

from pipelines.tools.cli import UserError  # noqa: E402

PAGES = ("reference/commands.md", "reference/python.md")
FOLDERS = ("training", "training/hpc", "data_scripts", "pipelines", "training/benchmarks")
POSITIONAL = "positional arguments"
HELP_COLUMNS = 4
"""Least indent of a line of help; flags are indented by 2."""
CLASSES = {
    "Pipelines": (
        "pipelines.latent_diffusion.LatentDiffusionPipeline",
        "pipelines.autoencoder.AutoencoderPipeline",
        "pipelines.fusion_controlnet_pipeline.FusionControlNetPipeline",
        "pipelines.poster_decoder.PosterDecoderPipeline",
        "pipelines.poster_controlnet_pipeline.PosterControlNetPipeline",
        "pipelines.layout_analysis.LayoutAnalysisPipeline",
        "pipelines.image_caption.ImageCaptionPipeline",
    ),
    "Models": (
        "pipelines.models.multi_head_autoencoder.MultiHeadAutoencoderKL",
        "pipelines.models.patch_transformer.PatchTransformer2DModel",
        "pipelines.models.fusion_controlnet.FusionControlNetModel",
        "pipelines.models.caption_prior.CaptionPrior",
        "pipelines.models.design_brief_encoder.DesignBriefEncoder",
        "pipelines.models.layout_encoder.LayoutEncoderModel",
        "pipelines.models.grammar_abstractor.GrammarAbstractorModel",
        "pipelines.models.image_caption_model.ImageCaptionModel",
    ),
    "Latents": ("pipelines.common.latents",),
    "Training": ("training.api", "training.core.stage"),
    "Metrics": ("training.metrics.distances", "training.metrics.memorization"),
}
"""What the page of classes and functions describes, by heading."""


@dataclass
class Flag:
    """A flag of a command.

    Attributes:
        names: as they are typed, with a placeholder for the value: "--seed N".
        help: what the flag means, with its default.
    """

    names: str
    help: str = ""


@dataclass
class Command:
    """A command as its help describes it.

    Attributes:
        path: of the script, from the root of the repository.
        description: what it does, with examples.
        groups: the flags, by the title of their group.
    """

    path: str
    description: str = ""
    groups: dict[str, list[Flag]] = field(default_factory=dict)


def scripts() -> list[Path]:
    """Return the commands of the project in the order of FOLDERS."""
    found = (path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py")))
    return [path for path in found if "def main(" in path.read_text(encoding="utf-8") and _is_command(path)]


def _is_command(path: Path) -> bool:
    return '__name__ == "__main__"' in path.read_text(encoding="utf-8")


def help_of(path: Path) -> str:
    """Return everything that a command prints as its help."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    module, printed, program = importlib.import_module(name), io.StringIO(), sys.argv
    sys.argv = [str(path)]
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            try:
                module.main(["--help_all"])
            except UserError:  # a command with few flags lists all of them as its help
                module.main(["--help"])
    finally:
        sys.argv = program
    return printed.getvalue()


def read_help(path: str, text: str) -> Command:
    """Return the command that a help text describes, in the layout of argparse."""
    command, title, flag, description = Command(path), "", None, []
    for line in text.split("\n\n", 1)[-1].splitlines():  # the usage comes first
        heading = re.fullmatch(r"(\S.*):", line)
        entry = re.match(r"  (-\S.*?)(?:  +(\S.*))?$" if title != POSITIONAL else r"  (\S+)(?:  +(\S.*))?$", line)
        if heading and not entry and (command.groups or _is_title(heading[1])):
            title, flag = heading[1], None
            command.groups[title] = []
        elif entry and title:
            flag = Flag(entry[1], entry[2] or "")
            command.groups[title].append(flag)
        elif flag and line.startswith(" " * HELP_COLUMNS):
            flag.help = f"{flag.help} {line.strip()}".strip()
        elif not title:
            description.append(line)
    command.description = "\n".join(description).strip()
    command.groups = {title: flags for title, flags in command.groups.items() if flags}
    return command


def _is_title(text: str) -> bool:
    return text in ("Essentials", "Options", "options", POSITIONAL) or text.startswith("--")


def commands() -> Iterator[Command]:
    """Yield the commands of the project."""
    os.environ["COLUMNS"] = "120"
    for path in scripts():
        yield read_help(path.relative_to(ROOT).as_posix(), help_of(path))


def page_of(command: Command) -> str:
    """Return the section of a command as Markdown."""
    lines = [f"## {command.path}", "", "```text", command.description, "```", ""]
    for title, flags in command.groups.items():
        lines += [f"### {title} {{: #{_anchor(command.path, title)} }}", "", "| flag | meaning |", "|---|---|"]
        lines += [f"| `{flag.names}` | {_cell(flag.help)} |" for flag in flags]
        lines.append("")
    return "\n".join(lines)


def _anchor(path: str, title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{path} {title}".lower()).strip("-")


def _cell(text: str) -> str:
    """Return a text as it is written in a cell of a table: nothing in it is Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>|])", r"\\\1", text).replace(r"\<", "&lt;").replace(r"\>", "&gt;")


def notebook_as_markdown(text: str) -> str:
    """Return the cells of a notebook as Markdown; they have no outputs."""
    sources = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(f"```python\n{source}\n```" if kind == "code" else source for kind, source in sources)


def write_pages() -> None:
    """Write the pages into the site that is being built."""
    import mkdocs_gen_files

    with mkdocs_gen_files.open(PAGES[0], "w") as page:
        page.write("# Commands and flags\n\nEvery command with all of its flags, as `--help_all` prints them.\n\n")
        page.writelines(page_of(command) + "\n" for command in commands())
    with mkdocs_gen_files.open(PAGES[1], "w") as page:
        page.write("# Classes and functions\n\n")
        for title, names in CLASSES.items():
            page.write(f"## {title}\n\n" + "".join(f"::: {name}\n\n" for name in names))
    for path, name in OUTSIDE.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        text = notebook_as_markdown(text) if path.endswith(".ipynb") else text
        with mkdocs_gen_files.open(name, "w") as page:
            page.write(with_links_of_the_site(text, path, name))


if __name__ == "<run_path>":  # the name under which mkdocs-gen-files runs it
    write_pages()
