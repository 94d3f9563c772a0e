"""Saves pipeline folders that load where Halftone is not installed, with the source files of all code that is not in
Diffusers or Transformers.

`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` copies source files into one flat
folder that all repositories share: the pipeline's file, the files that it imports relatively (but not the files that
those import), and one file for each custom component. A file whose name is already that of a loaded module is executed
in that module. A file of the same name from a second repository would therefore silently replace the code of the first.
Hence the rules of `ship`:

- every shipped file has a hash of its content in its name (`latents_3f2a9c1b.py`) and is imported by this name; all
  files are in one flat folder, whichever folders they come from;
- the published file of the pipeline also imports the files that only its helpers need;
- a component's file imports no other file.

A helper imports others with a space after the dot (`from . latents_3f2a9c1b import …`), a form that Diffusers does not
recognize. Otherwise it would ask the Hub again for a file each time that another one imports it.

A pipeline loaded from such a folder can be saved in the same way; its published files are then saved unchanged.

This file is shipped inside published pipelines.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

from .compatibility import check_versions, make_portable

RELATIVE_IMPORT = re.compile(r"^(\s*from\s+)(\.+)\s*([\w.]+)(\s+import\b)", flags=re.MULTILINE)
PACKAGE_IMPORT = re.compile(r"^\s*from\s+\.+\s+import\b", flags=re.MULTILINE)
HASH_SUFFIX = re.compile(r"_[0-9a-f]{8}$")
STOCK_LIBRARIES = ("diffusers", "transformers")
# Where Halftone keeps the classes of components, beside the folder of this file.
MODELS_PACKAGE = "models"
HELPERS_OF_HELPERS = (
    "\n\n# Diffusers copies the files that this file imports, but not their imports, so those are imported here too.\n"
)
# Where diffusers puts the code that came with a folder or repository.
REMOTE_PACKAGE = "diffusers_modules"


class StandalonePipelineMixin:
    """Adds a `save_pretrained` whose folder loads without Halftone. Name it before DiffusionPipeline.

    Defining such a class raises an ImportError if Diffusers or Transformers is older than the oldest supported version.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_versions()

    def save_pretrained(self, save_directory: Any, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save as `DiffusionPipeline.save_pretrained` does, and add the source files of custom classes.

        Raises:
            ValueError: `push_to_hub` is True; it would upload the folder before its source files are in it.
        """
        if push_to_hub:
            raise ValueError(
                "`push_to_hub=True` would upload before the source files are added; save first, then upload the folder"
            )
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        ship(self, Path(save_directory))

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """Create a pipeline of this class from the components and the config of another one, sharing its weights.

        `DiffusionPipeline.from_pipe` would leave out every component whose class is not exactly that of the annotation
        (a VAE may be of any class), and convert the shared weights to float32.

        Args:
            pipeline: any pipeline that has the components, such as one of another class.
            **kwargs: components and config values that replace those of `pipeline`; `torch_dtype` (or `dtype`) converts
                the weights, which are otherwise left as they are.

        Raises:
            ValueError: a component is missing, or an argument is unknown; the message names it.
        """
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        kwargs.pop("torch_dtype", None)
        if not isinstance(getattr(pipeline, "components", None), dict):
            raise ValueError(f"`pipeline` must be a pipeline, but is {pipeline!r}")
        parameters = inspect.signature(cls.__init__).parameters
        known = [name for name in parameters if name != "self"]
        unknown = sorted(kwargs.keys() - set(known))
        if unknown:
            raise ValueError(f"{cls.__name__} has no `{unknown[0]}`; it has {', '.join(known)}")
        available = {**pipeline.config, **pipeline.components, **kwargs}
        values = {name: available[name] for name in known if name in available}
        needed = [name for name in known if parameters[name].default is inspect.Parameter.empty]
        # A model with a transformer has None for the U-Net, which has no default.
        optional = getattr(cls, "_optional_components", [])
        missing = [name for name in needed if values.get(name) is None and not (name in values and name in optional)]
        if missing:
            raise ValueError(
                f"{type(pipeline).__name__} has no `{missing[0]}`, which {cls.__name__} needs; "
                f"pass it, as in `from_pipe(pipeline, {missing[0]}=...)`"
            )
        created = cls(**values)
        return created if dtype is None else created.to(dtype=dtype)  # type: ignore[attr-defined]

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Load the folder's config. In Halftone itself, it names Halftone's classes, so that no shipped code runs."""
        loaded = super().load_config(*args, **kwargs)  # type: ignore[misc]
        if not cls.__module__.startswith(REMOTE_PACKAGE):
            config = loaded[0] if isinstance(loaded, tuple) else loaded
            _name_own_classes(config, cls)
        return loaded


def ship(pipeline: Any, folder: Path) -> None:
    """Add the source files of `pipeline`'s class and custom components to its saved `folder` and model_index.json.

    Raises:
        ValueError: the folder would not load, because a component's file imports another file, a relative import does
            not name a file, or two files have the same name.
    """
    index_path = folder / "model_index.json"
    index = json.loads(index_path.read_text(encoding="utf-8"))
    pipeline_file = _source_file(type(pipeline))
    module_name = _write(_published_files(pipeline_file), pipeline_file, folder)
    index["_class_name"] = [module_name, type(pipeline).__name__]
    for name, component in pipeline.components.items():
        # torch.compile wraps a component in a class of its own
        component_class = type(getattr(component, "_orig_mod", component))
        if component is None:
            continue
        if component_class.__module__.split(".")[0] in STOCK_LIBRARIES:
            index[name] = make_portable(folder / name, component) or index[name]
            continue
        component_file = _source_file(component_class)
        files = _published_files(component_file)
        if len(files) > 1:
            raise ValueError(
                f"{component_file.name} of component '{name}' imports another file, but Diffusers loads a component's "
                "file alone; move the imported code into it"
            )
        index[name] = [_write(files, component_file, folder / name), component_class.__name__]
    index.pop("_name_or_path", None)
    index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _forget_local_paths(folder)


def _forget_local_paths(folder: Path) -> None:
    """Remove local paths from the configs: Diffusers writes there where a component was loaded from."""
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
    """Return file -> (published module name, published source) for `path` and all files that it imports relatively.

    Raises:
        ValueError: two files have the same name, which a flat folder cannot hold, or a whole package is imported,
            which a flat folder does not have.
    """
    files: dict[Path, tuple[str, str]] = {}
    _collect(path, files)
    stems = [HASH_SUFFIX.sub("", file.stem) for file in files]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise ValueError(
            f"{path.name} imports two files called {', '.join(twice)}; a published folder is flat, so rename one file"
        )
    return files


def _collect(path: Path, files: dict[Path, tuple[str, str]], above: tuple[Path, ...] = ()) -> None:
    """Add `path` and the files it imports to `files`, helpers first: a file's hash covers the names of its helpers."""
    source = path.read_text(encoding="utf-8")
    if PACKAGE_IMPORT.search(source):
        raise ValueError(
            f"{path.name} contains 'from . import', but a published folder has no packages; import from a file instead"
        )
    direct = list(
        dict.fromkeys(_imported_file(path, dots, name) for _, dots, name, _ in RELATIVE_IMPORT.findall(source))
    )
    for helper in direct:
        if helper not in files:
            _collect(helper, files, (*above, path))

    dot = ". " if above else "."  # the files of the pipeline's own file are fetched by Diffusers

    def published_line(match: re.Match[str]) -> str:
        return f"{match[1]}{dot}{files[_imported_file(path, match[2], match[3])][0]}{match[4]}"

    source = RELATIVE_IMPORT.sub(published_line, source)
    if not above:
        hidden = sorted(name for file, (name, _) in files.items() if file not in direct)
        if hidden:
            lines = [f"from .{name} import __name__ as _{name}  # noqa: E402, F401\n" for name in hidden]
            source = source.rstrip("\n") + HELPERS_OF_HELPERS + "".join(lines)
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    files[path] = (f"{HASH_SUFFIX.sub('', path.stem)}_{digest}", source)


def _imported_file(path: Path, dots: str, name: str) -> Path:
    """Return the file that `from {dots}{name} import …` in `path` refers to. Raises ValueError if there is none."""
    file = path.parents[len(dots) - 1].joinpath(*name.split(".")).with_suffix(".py")
    if not file.is_file():
        raise ValueError(
            f"{path.name} imports '{dots}{name}', which is not a file ({file}); import from a file instead"
        )
    return file


def _write(files: dict[Path, tuple[str, str]], main: Path, folder: Path) -> str:
    """Write the published files, remove older versions of them, and return the published module name of `main`."""
    stems = {HASH_SUFFIX.sub("", name) for name, _ in files.values()}
    for old in folder.glob("*.py"):
        if HASH_SUFFIX.search(old.stem) and HASH_SUFFIX.sub("", old.stem) in stems:
            old.unlink()
    for published_name, source in files.values():
        (folder / f"{published_name}.py").write_text(source, encoding="utf-8")
    return files[main][0]


def _name_own_classes(config: Any, cls: type) -> None:
    """Replace published module names by those of Halftone's modules, and import these, as Diffusers requires."""
    import importlib

    import diffusers
    import transformers

    package = cls.__module__.rpartition(".")[0]
    if isinstance(config.get("_class_name"), list):
        config["_class_name"] = config["_class_name"][1]
    for name, value in config.items():
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and HASH_SUFFIX.search(value[0]):
            module = importlib.import_module(f"{package}.{MODELS_PACKAGE}.{HASH_SUFFIX.sub('', value[0])}")
            # Diffusers looks up the base class with the loading method by its name in the component's own module.
            for base in (diffusers.ModelMixin, transformers.PreTrainedModel):
                vars(module).setdefault(base.__name__, base)
            config[name] = [module.__name__, value[1]]
