"""Reading with the worker processes of PyTorch."""

from __future__ import annotations

from torch.utils.data import DataLoader


def read_to_the_end(loader: DataLoader) -> None:
    """Read all batches, and end the workers also after an error.

    Otherwise the error keeps the iterator until it is found as garbage, which takes five seconds for each worker.
    """
    batches = iter(loader)
    try:
        for _ in batches:
            pass
    finally:
        if loader.num_workers:
            batches._shutdown_workers()  # type: ignore[attr-defined]
