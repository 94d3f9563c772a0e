"""hub.json in the run folder: which content of the run is on the Hub.

What is still to be uploaded is the difference between what the run folder contains and this record. Nothing else has to
be remembered about uploads that failed, or whose process was killed.
"""

from __future__ import annotations

import threading
from pathlib import Path
from urllib.parse import urlsplit

from pipelines.tools.checkpoint_links import follow_links
from training.core.files import read_json_object, write_json

FILE = "hub.json"


class UploadRecord:
    """The fingerprint of the content that was last uploaded to each path, for each repository.

    Args:
        run_dir: the run folder.
    """

    def __init__(self, run_dir: Path):
        self.file = run_dir / FILE
        self._lock = threading.Lock()  # uploads note their success on a thread of their own

    def repositories(self) -> dict[str, dict[str, str]]:
        """Return {repository: {path in it ("" is its root): fingerprint}}; empty if the file is missing or damaged.

        Without a record, everything is compared with the Hub again, which costs time but no second upload.
        """
        content = (read_json_object(self.file) or {}).get("repositories")
        try:
            return {repository: dict(paths) for repository, paths in content.items()} if content else {}
        except (ValueError, TypeError, AttributeError):
            return {}

    def has(self, repository: str, path: str, fingerprint: str) -> bool:
        """Return whether this content was the last one that was uploaded to `path`."""
        return self.repositories().get(repository, {}).get(path) == fingerprint

    def note(self, repository: str, path: str, fingerprint: str) -> None:
        """Record that the content is now on the Hub. Raises OSError if the file cannot be written."""
        with self._lock:
            repositories = self.repositories()
            repositories.setdefault(repository, {})[path] = fingerprint
            write_json(self.file, {"repositories": repositories})

    def forget(self, repository: str) -> None:
        """Forget what was uploaded to a repository, because it does not exist any more. Raises OSError."""
        with self._lock:
            repositories = self.repositories()
            if repositories.pop(repository, None) is not None:
                write_json(self.file, {"repositories": repositories})


def published_as(model: str) -> str | None:
    """Return the name on the Hub (`user/name`) of a model; None if it was not uploaded.

    Args:
        model: a run, a pipeline folder or a checkpoint, which has the name under which its run was uploaded, or a name
            on the Hub itself.
    """
    folder = follow_links(model)
    if not folder.exists():
        return model
    for run in (folder, *folder.resolve().parents[:3]):
        for repository in UploadRecord(run).repositories():
            return urlsplit(repository).path.strip("/")
    return None
