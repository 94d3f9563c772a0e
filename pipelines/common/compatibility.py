"""The oldest Diffusers and Transformers that load a published folder, and the files that they read differently.

The newest Transformers writes two kinds of files that older versions do not read:
- It calls the class of a tokenizer `TokenizersBackend`, a name that older versions do not have.
- It writes the weights of a CLIPTextModel without the prefix `text_model.`. Older versions find none of them by name,
  and continue with random weights and a warning.
All supported versions read the older form.

This file is shipped inside published pipelines, so it imports no other file of Halftone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OLDEST_VERSIONS = {"diffusers": "0.35.2", "transformers": "4.57.1"}
"""Tests load and draw with these versions and with the newest ones."""

TOKENIZER_CLASS = "PreTrainedTokenizerFast"
CLIP_PREFIX = "text_model."


def check_versions() -> None:
    """Raise an ImportError if the installed Diffusers or Transformers is older than `OLDEST_VERSIONS`."""
    import diffusers
    import transformers
    from diffusers.utils.import_utils import compare_versions

    installed = {"diffusers": diffusers.__version__, "transformers": transformers.__version__}
    if any(compare_versions(name, "<", oldest) for name, oldest in OLDEST_VERSIONS.items()):
        needed = " and ".join(f"{name} {oldest}" for name, oldest in OLDEST_VERSIONS.items())
        found = " and ".join(f"{name} {version}" for name, version in installed.items())
        raise ImportError(
            f"this pipeline needs {needed} or later, but {found} are installed; "
            "run `pip install --upgrade diffusers transformers`"
        )


def make_portable(folder: Path, component: Any) -> list[str] | None:
    """Rewrite the saved files of a component of Transformers in the form that all supported versions read.

    Args:
        folder: the component's folder in the saved pipeline.

    Returns:
        The component's entry for model_index.json, or None if that of Diffusers is right.
    """
    if type(component).__name__ == "CLIPTextModel":
        for file in sorted(folder.glob("*.safetensors")):
            _rename_tensors(file, CLIP_PREFIX)
        for index in folder.glob("*.safetensors.index*.json"):
            _rename_in_index(index, CLIP_PREFIX)
    settings_file = folder / "tokenizer_config.json"
    if not ((folder / "tokenizer.json").is_file() and settings_file.is_file()):
        return None
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = TOKENIZER_CLASS
    if isinstance(settings.get("extra_special_tokens"), list):  # older versions expect a dictionary under this name
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    _write_json(settings_file, settings)
    return ["transformers", TOKENIZER_CLASS]


def _rename_tensors(file: Path, prefix: str) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(file, "pt") as opened:
        names, metadata = list(opened.keys()), opened.metadata()
    if not all(name.startswith(prefix) for name in names):
        tensors = load_file(file)
        renamed = file.with_name(f".{file.name}.renamed")
        save_file({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, renamed, metadata)
        renamed.replace(file)


def _rename_in_index(file: Path, prefix: str) -> None:
    index = json.loads(file.read_text(encoding="utf-8"))
    index["weight_map"] = {
        name if name.startswith(prefix) else f"{prefix}{name}": shard for name, shard in index["weight_map"].items()
    }
    _write_json(file, index)


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
