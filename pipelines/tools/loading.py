"""Load a pipeline from a pipeline folder, a run, a checkpoint or the Hub."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..common.standalone import HASH_SUFFIX
from .checkpoint_links import CHECKPOINTS, follow_links
from .cli import UserError, located, nearest
from .devices import get_device
from .weights import PICKLES, pipeline_variant

INDEX = "model_index.json"


def load_pipeline(
    path: str | Path, *, checkpoint: str | None = None, dtype: Any = None, trust_remote_code: bool = False
) -> Any:
    """Load a pipeline on the CPU. Halftone's pipelines use its installed classes, not the code in their folders.

    Args:
        path: Pipeline folder, run, checkpoint or Hub id, see `find_pipeline`.
        checkpoint: Checkpoint of a run, see `find_pipeline`.
        dtype: torch dtype of the weights; None is float32.
        trust_remote_code: Whether to run the custom code of a pipeline whose class is not part of Halftone.

    Raises:
        UserError: If the pipeline does not exist or cannot be loaded.
    """
    import diffusers
    import torch

    folder = find_pipeline(path, checkpoint)
    name, pipeline_class = _class_name(folder), _own_class(folder)
    if isinstance(name, str) and not hasattr(diffusers, name):
        raise UserError(f"the pipeline in {folder} cannot be loaded: Diffusers has no {name}")
    if pipeline_class is None and isinstance(name, list) and not trust_remote_code:
        raise UserError(
            f"{folder} contains custom code that is not part of Halftone; read it, and add --trust_remote_code if you "
            "trust it"
        )
    options = {} if pipeline_class else {"trust_remote_code": trust_remote_code}
    variant = pipeline_variant(folder)
    try:
        with without_loading_bars():
            return (pipeline_class or diffusers.DiffusionPipeline).from_pretrained(
                folder, dtype=dtype or torch.float32, variant=variant, use_safetensors=True, **options
            )
    except (OSError, ValueError, RuntimeError, ImportError, TypeError, KeyError, AttributeError) as error:
        # Diffusers raises these for incomplete or foreign folders.
        raise UserError(f"the pipeline in {folder} cannot be loaded: {' '.join(str(error).split())[:400]}") from error


def load_on_device(path: str | Path, device: str | None, checkpoint: str | None = None, **options: Any) -> Any:
    """Load a pipeline on the device that `--device` names (see `get_device`).

    The path and the device are checked first, because importing Diffusers is slow.

    Args:
        path: Pipeline folder, run, checkpoint or Hub id, see `find_pipeline`.
        device: The value of `--device`.
        checkpoint: Checkpoint of a run, see `find_pipeline`.
        **options: Options of `load_pipeline`.

    Raises:
        UserError: If the device or the pipeline does not exist, or the pipeline cannot be loaded.
    """
    folder, chosen = find_pipeline(path, checkpoint), get_device(device)
    return load_pipeline(folder, **options).to(chosen)


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """Context manager that hides the progress bars of loading files, but not those of sampling or downloading."""
    import diffusers
    import transformers

    libraries = [library.utils.logging for library in (diffusers, transformers)]
    shown = [logging for logging in libraries if logging.is_progress_bar_enabled()]
    for logging in shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging in shown:
            logging.enable_progress_bar()


def find_pipeline(path: str | Path, checkpoint: str | None = None) -> Path:
    """Return the pipeline folder that `path` refers to.

    Args:
        path: A pipeline folder; a run, which gives its final pipeline, or that of its best checkpoint, or that of its
            latest checkpoint, whichever exists first; a checkpoint of a run; or a Hub id (`user/name`), which is
            downloaded.
        checkpoint: Checkpoint of the run: `best`, `latest` or a folder name.

    Raises:
        UserError: If `path` does not refer to a pipeline.
    """
    folder = follow_links(path)
    if not folder.exists():
        if checkpoint is None and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)) and not folder.parent.exists():
            return _download(str(path))
        raise UserError(f"found no pipeline, run or checkpoint at {located(path)}; give the path of one, or a Hub id")
    if checkpoint is not None:
        return _checkpoint_pipeline(folder, checkpoint)
    checkpoints = (follow_links(folder / CHECKPOINTS / name) for name in ("best", "latest"))
    candidates = [folder, folder / "pipeline", *(checkpoint / "pipeline" for checkpoint in checkpoints)]
    for candidate in candidates:
        if (candidate / INDEX).is_file():
            return candidate
    raise UserError(
        f"{folder} does not contain a pipeline: {INDEX}, pipeline/ and checkpoints/best/pipeline/ are all missing "
        "(a run saves its first pipeline with its first checkpoint)"
    )


def _checkpoint_pipeline(run: Path, checkpoint: str) -> Path:
    folder = follow_links(run / CHECKPOINTS / checkpoint) / "pipeline"
    if (folder / INDEX).is_file():
        return folder
    known = sorted(path.parent.parent.name for path in (run / "checkpoints").glob(f"*/pipeline/{INDEX}"))
    raise UserError(
        f"{run} has no checkpoint '{checkpoint}' with a pipeline{nearest(checkpoint, known)} "
        f"(available: {', '.join(known) or 'none'})"
    )


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # The repository may contain a whole run, with its checkpoints.
        return Path(snapshot_download(repo_id, ignore_patterns=["checkpoints/*", *PICKLES]))
    # Errors of the client share no base class of their own: HTTP errors are OSErrors, invalid ids are ValueErrors.
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"'{repo_id}' is not a local folder and cannot be downloaded from the Hub: {reason}") from error


def _class_name(folder: Path) -> Any:
    return json.loads((folder / INDEX).read_text(encoding="utf-8")).get("_class_name")


def _own_class(folder: Path) -> Any:
    """Return Halftone's class for the pipeline in `folder`, or None if its class is not part of Halftone."""
    name = _class_name(folder)
    if not isinstance(name, list):
        return None
    module, class_name = name
    public = importlib.import_module("..", __package__)
    if class_name not in public.__all__:
        return None
    own = getattr(public, class_name)
    return own if own.__module__ == f"{public.__name__}.{HASH_SUFFIX.sub('', module)}" else None
