"""The class names of the models that a run goes on from: its own checkpoints, or the model of `--init_from`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.tools.checkpoint_links import follow_links, steps_in
from training.core.files import read_json_object
from training.core.stage import StageContext
from training.run.folder import RunFolder

_INDEXES = ("model_index.json", "vae/config.json")


def recorded_class_names(config: Any, context: StageContext) -> list[str]:
    """Return the class names, by id, of the model whose weights a stage will get; empty if it has none.

    Which ids the classes of a column get is decided once. Earlier versions numbered them in another way, and a run of
    an earlier version keeps its ids.
    """
    for folder in _models(config, context):
        for index in _INDEXES:
            names = (read_json_object(folder / index) or {}).get("id2label")
            if isinstance(names, Mapping) and names:
                return [str(names[id_]) for id_ in sorted(names, key=int)]
    return []


def _models(config: Any, context: StageContext) -> Iterator[Path]:
    """Yield the folders in which the pipeline of that model may be."""
    given = [config.validate_model]
    if context.resuming:
        given += [config.resume_from_checkpoint, *map(str, steps_in(RunFolder(config.output_dir).checkpoints))]
    for path in (*given, config.init_from):
        folder = follow_links(os.path.expanduser(path)) if path else None
        if folder is not None and folder.is_dir():
            yield from (folder, folder / "pipeline")
            yield from (step / "pipeline" for step in steps_in(folder / "checkpoints"))
