"""A pipeline from wherever it is: a pipeline folder, a run, a checkpoint, or the Hub."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..common.standalone import HASH_SUFFIX
from .cli import UserError, nearest
from .devices import get_device

INDEX = "model_index.json"


def load_pipeline(
    path: str | Path, *, checkpoint: str | None = None, dtype: Any = None, trust_remote_code: bool = False
) -> Any:
    """The DiffusionPipeline at `path`, on the CPU, loaded with Halftone's own classes where the folder names them.

    Args:
        path, checkpoint: see `find_pipeline`.
        dtype: torch dtype of the weights; None is float32.
        trust_remote_code: run code that comes with a pipeline of a class that Halftone does not have.

    Raises:
        UserError: nothing there that can be loaded.
    """
    import diffusers
    import torch

    folder = find_pipeline(path, checkpoint)
    name, pipeline_class = _class_name(folder), _own_class(folder)
    if isinstance(name, str) and not hasattr(diffusers, name):
        raise UserError(f"the pipeline in {folder} cannot be loaded: Diffusers has no {name}")
    if pipeline_class is None and isinstance(name, list) and not trust_remote_code:
        raise UserError(
            f"{folder} comes with code of its own that is no part of Halftone; read it, and if you trust it, "
            "say --trust_remote_code"
        )
    options = {} if pipeline_class else {"trust_remote_code": trust_remote_code}
    try:
        with without_loading_bars():
            return (pipeline_class or diffusers.DiffusionPipeline).from_pretrained(
                folder, dtype=dtype or torch.float32, **options
            )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        # What a half-copied or foreign folder does to diffusers is of these kinds.
        raise UserError(f"the pipeline in {folder} cannot be loaded: {' '.join(str(error).split())[:400]}") from error


def load_on_device(path: str | Path, device: str | None, checkpoint: str | None = None, **options: Any) -> Any:
    """The DiffusionPipeline at `path` on the device that `--device` names (see `get_device`).

    The path and then the device are checked before the slow imports.

    Args:
        **options: of `load_pipeline`.

    Raises:
        UserError: nothing there that can be loaded, or no such device.
    """
    folder, chosen = find_pipeline(path, checkpoint), get_device(device)
    return load_pipeline(folder, **options).to(chosen)


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """A bar for each of a handful of small files tells nothing; those of sampling steps stay."""
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
    """The pipeline folder that `path` means.

    Args:
        path: a pipeline folder; a run (its final pipeline if it has one, else that of its best checkpoint, else of the
            latest); a checkpoint of a run; or a Hub id (`user/name`), which is downloaded.
        checkpoint: of a run: `best`, `latest`, or a folder's name.

    Raises:
        UserError: nothing of these.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        if checkpoint is None and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)) and not folder.parent.exists():
            return _download(str(path))
        raise UserError(f"there is no pipeline, run or checkpoint at '{path}'; give the path of one, or a Hub id")
    if checkpoint is not None:
        return _checkpoint_pipeline(folder, checkpoint)
    candidates = [folder, folder / "pipeline", *(folder / "checkpoints" / n / "pipeline" for n in ("best", "latest"))]
    for candidate in candidates:
        if (candidate / INDEX).is_file():
            return candidate
    raise UserError(
        f"{folder} holds no pipeline: no {INDEX}, no pipeline/ and no checkpoints/best/pipeline/ "
        "(a run writes its first with its first checkpoint)"
    )


def _checkpoint_pipeline(run: Path, checkpoint: str) -> Path:
    folder = run / "checkpoints" / checkpoint / "pipeline"
    if (folder / INDEX).is_file():
        return folder
    known = sorted(path.parent.parent.name for path in (run / "checkpoints").glob(f"*/pipeline/{INDEX}"))
    raise UserError(
        f"{run} has no checkpoint '{checkpoint}' with a pipeline{nearest(checkpoint, known)} "
        f"(it has {', '.join(known) or 'none'})"
    )


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # A run that was published whole may have its checkpoints there as well.
        return Path(snapshot_download(repo_id, ignore_patterns=["checkpoints/*"]))
    # The client's errors share no base class beyond these: HTTP errors are OSErrors, bad ids ValueErrors.
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"'{repo_id}' is no folder here, and could not be had from the Hub: {reason}") from error


def _class_name(folder: Path) -> Any:
    return json.loads((folder / INDEX).read_text(encoding="utf-8")).get("_class_name")


def _own_class(folder: Path) -> Any:
    """Halftone's class for the pipeline in `folder`, or None where it has none of that name."""
    name = _class_name(folder)
    if not isinstance(name, list):
        return None
    module, class_name = name
    public = importlib.import_module("..", __package__)
    if class_name not in public.__all__:
        return None
    own = getattr(public, class_name)
    return own if own.__module__ == f"{public.__name__}.{HASH_SUFFIX.sub('', module)}" else None
