"""The record of a search: a file for each batch of evaluated posters, from which everything else is made again.

A file is written once and as a whole. A search that is killed has lost nothing but the batch that it was painting.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from pipelines.tools.cli import UserError
from training.core.files import delete_leftovers, write_atomically

BATCHES = "batches"


class Records:
    """The evaluated batches of a search in `folder`, in their order.

    Args:
        batch_size: number of posters in each.
    """

    def __init__(self, folder: Path, batch_size: int):
        self._folder, self._batch_size = folder / BATCHES, batch_size
        self._folder.mkdir(parents=True, exist_ok=True)
        delete_leftovers(self._folder)
        self._count = len(list(self._folder.glob("*.npz")))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self.read(number) for number in range(len(self)))

    def append(self, evaluated: dict[str, np.ndarray]) -> None:
        """Write a batch. The same arrays give the same bytes."""

        def write(file: IO[bytes]) -> None:
            np.savez_compressed(file, **evaluated)  # type: ignore[arg-type]

        write_atomically(self._file(self._count), write)
        self._count += 1

    def read(self, number: int) -> dict[str, np.ndarray]:
        """Return the arrays of a batch, but not its posters.

        Raises:
            UserError: its file is missing or damaged.
        """
        return self._arrays(number, posters=False)

    def row(self, evaluation: int) -> dict[str, np.ndarray]:
        """Return all values of one evaluation, its poster included."""
        arrays = self._with_posters(evaluation // self._batch_size)
        return {name: array[evaluation % self._batch_size] for name, array in arrays.items()}

    def poster(self, evaluation: int) -> Image.Image:
        """Return the poster of one evaluation."""
        return Image.fromarray(self.row(evaluation)["posters"])

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:06d}.npz"

    @lru_cache(maxsize=64)  # noqa: B019 - the records live as long as the process
    def _with_posters(self, number: int) -> dict[str, np.ndarray]:
        return self._arrays(number, posters=True)

    def _arrays(self, number: int, *, posters: bool) -> dict[str, np.ndarray]:
        file = self._file(number)
        try:
            with np.load(file, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files if posters or name != "posters"}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{file} is missing or damaged ({error}); restore it from a backup, or delete it and all files after "
                "it to resume the search before it"
            ) from None
