"""Pipeline folders that load where Halftone is not installed: they carry the source files of what is not stock.

`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` of diffusers 0.42 copies the pipeline's file, the
files that it imports relatively (those alone, not what they import in turn) and each custom component's one file into
one flat folder shared by every repository, and runs a file anew in the module that already has its name. So a file of
the same name from a second repository silently replaces the first one's code. Hence the three rules of `ship`:

- every shipped file has a hash of its content in its name (`latents_3f2a9c1b.py`), and imports name it so, all in one
  flat folder, whichever folders they lie in here;
- the pipeline's published file also imports what only its helpers need;
- a component's file imports no sibling.

A pipeline loaded from such a folder saves in the same way again: published files publish to themselves.

This file is shipped inside published pipelines, so it imports nothing of ours.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

RELATIVE_IMPORT = re.compile(r"^(\s*from\s+)(\.+)([\w.]+)(\s+import\b)", flags=re.MULTILINE)
PACKAGE_IMPORT = re.compile(r"^\s*from\s+\.+\s+import\b", flags=re.MULTILINE)
HASH_SUFFIX = re.compile(r"_[0-9a-f]{8}$")
STOCK_LIBRARIES = ("diffusers", "transformers")
# Where Halftone keeps the classes of components, beside the folder of this file.
MODELS_PACKAGE = "models"
HELPERS_OF_HELPERS = (
    "\n\n# Diffusers copies the files that this one imports, but not what those import: that is named here as well.\n"
)
# Where diffusers puts the code that came with a folder or repository.
REMOTE_PACKAGE = "diffusers_modules"


class StandalonePipelineMixin:
    """Gives a `DiffusionPipeline` a `save_pretrained` whose folder stands alone. Name it before DiffusionPipeline."""

    def save_pretrained(self, save_directory: Any, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save as `DiffusionPipeline.save_pretrained` does, and ship the source of what is not stock.

        Raises:
            ValueError: `push_to_hub`, which would upload the folder before its source files are in it.
        """
        if push_to_hub:
            raise ValueError(
                "`push_to_hub=True` would upload before the source files are added; save first, then upload the folder"
            )
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        ship(self, Path(save_directory))

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """The folder's config; inside Halftone it names our own classes, so that no shipped code is run there."""
        loaded = super().load_config(*args, **kwargs)  # type: ignore[misc]
        if not cls.__module__.startswith(REMOTE_PACKAGE):
            config = loaded[0] if isinstance(loaded, tuple) else loaded
            _name_own_classes(config, cls)
        return loaded


def ship(pipeline: Any, folder: Path) -> None:
    """Put the source files of `pipeline`'s class and custom components into its saved `folder`, and name them in
    model_index.json.

    Raises:
        ValueError: a component's file that imports a sibling, a relative import of something other than a file, or two
            files of one name: such a folder would not load.
    """
    index_path = folder / "model_index.json"
    index = json.loads(index_path.read_text(encoding="utf-8"))
    pipeline_file = _source_file(type(pipeline))
    module_name = _write(_published_files(pipeline_file), pipeline_file, folder)
    index["_class_name"] = [module_name, type(pipeline).__name__]
    for name, component in pipeline.components.items():
        # torch.compile wraps a component in a class of its own
        component_class = type(getattr(component, "_orig_mod", component))
        if component is None or component_class.__module__.split(".")[0] in STOCK_LIBRARIES:
            continue
        component_file = _source_file(component_class)
        files = _published_files(component_file)
        if len(files) > 1:
            raise ValueError(f"{component_file.name} of component '{name}' imports a sibling, and could not load alone")
        index[name] = [_write(files, component_file, folder / name), component_class.__name__]
    index.pop("_name_or_path", None)
    index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _forget_local_paths(folder)


def _forget_local_paths(folder: Path) -> None:
    """Diffusers writes the path that a component was loaded from into its config: nobody else's business."""
    for config_path in folder.glob("*/config.json"):
        config = json.loads(config_path.read_text(encoding="utf-8"))
        if Path(config.get("_name_or_path") or "").is_absolute():
            del config["_name_or_path"]
            config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _source_file(cls: type) -> Path:
    source = inspect.getsourcefile(sys.modules[cls.__module__])
    if source is None:
        raise ValueError(f"{cls.__name__} has no source file (module {cls.__module__}), so it cannot be published")
    return Path(source)


def _published_files(path: Path) -> dict[Path, tuple[str, str]]:
    """File here -> (published module name, published source), of `path` and of all that it imports relatively.

    Raises:
        ValueError: two files of one name, which a flat folder could not tell apart, or an import of a whole package,
            which it does not have.
    """
    files: dict[Path, tuple[str, str]] = {}
    _collect(path, files)
    stems = [HASH_SUFFIX.sub("", file.stem) for file in files]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise ValueError(f"{path.name} imports two files called {', '.join(twice)}; a published folder is flat")
    return files


def _collect(path: Path, files: dict[Path, tuple[str, str]], above: tuple[Path, ...] = ()) -> None:
    """Add `path` and what it imports to `files`, helpers first: a file's hash covers the names of its helpers."""
    source = path.read_text(encoding="utf-8")
    if PACKAGE_IMPORT.search(source):
        raise ValueError(f"{path.name} says 'from . import', but a published folder has no packages; name the file")
    direct = list(
        dict.fromkeys(_imported_file(path, dots, name) for _, dots, name, _ in RELATIVE_IMPORT.findall(source))
    )
    for helper in direct:
        if helper not in files:
            _collect(helper, files, (*above, path))

    def published_line(match: re.Match[str]) -> str:
        return f"{match[1]}.{files[_imported_file(path, match[2], match[3])][0]}{match[4]}"

    source = RELATIVE_IMPORT.sub(published_line, source)
    if not above:
        hidden = sorted(name for file, (name, _) in files.items() if file not in direct)
        if hidden:
            lines = [f"from .{name} import __name__ as _{name}  # noqa: E402, F401\n" for name in hidden]
            source = source.rstrip("\n") + HELPERS_OF_HELPERS + "".join(lines)
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    files[path] = (f"{HASH_SUFFIX.sub('', path.stem)}_{digest}", source)


def _imported_file(path: Path, dots: str, name: str) -> Path:
    """The file that `from {dots}{name} import …` in `path` means. Raises ValueError if there is none."""
    file = path.parents[len(dots) - 1].joinpath(*name.split(".")).with_suffix(".py")
    if not file.is_file():
        raise ValueError(
            f"{path.name} imports '{dots}{name}', which is no file ({file}); name one that can be published"
        )
    return file


def _write(files: dict[Path, tuple[str, str]], main: Path, folder: Path) -> str:
    """Write the published files; the published module name of `main`. Files of an older version there are removed."""
    stems = {HASH_SUFFIX.sub("", name) for name, _ in files.values()}
    for old in folder.glob("*.py"):
        if HASH_SUFFIX.search(old.stem) and HASH_SUFFIX.sub("", old.stem) in stems:
            old.unlink()
    for published_name, source in files.values():
        (folder / f"{published_name}.py").write_text(source, encoding="utf-8")
    return files[main][0]


def _name_own_classes(config: Any, cls: type) -> None:
    """Replace published module names by those of our own modules, which must be imported for diffusers to take them."""
    import importlib

    import diffusers
    import transformers

    package = cls.__module__.rpartition(".")[0]
    if isinstance(config.get("_class_name"), list):
        config["_class_name"] = config["_class_name"][1]
    for name, value in config.items():
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and HASH_SUFFIX.search(value[0]):
            module = importlib.import_module(f"{package}.{MODELS_PACKAGE}.{HASH_SUFFIX.sub('', value[0])}")
            # Diffusers looks up the base class that knows how to load, by its name, in the component's own module.
            for base in (diffusers.ModelMixin, transformers.PreTrainedModel):
                vars(module).setdefault(base.__name__, base)
            config[name] = [module.__name__, value[1]]
