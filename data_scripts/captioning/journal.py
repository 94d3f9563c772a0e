"""A journal of what is captioned, so that a killed process loses at most one batch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.tools.cli import UserError

_PROBLEM = "problem"


class Journal:
    """Captions by the path of their image, in a file of one line for each batch that is on the disk at once.

    Args:
        file: the file; it may exist, and end in the middle of a line.
        settings: what the captions depend on; an existing journal must have been made with the same.

    Raises:
        UserError: the journal was made with other settings.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]):
        self._file = file
        self.captions: dict[str, str] = {}
        self.problems: dict[str, str] = {}
        """Why an image has no caption, by its path"""
        lines = self._lines()
        if not lines:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._append({"settings": dict(settings)})
            return
        earlier = lines[0].get("settings", {})
        changed = [
            f"--{name}: {earlier.get(name)} → {value}" for name, value in settings.items() if earlier.get(name) != value
        ]
        if changed:
            raise UserError(
                f"the captions in {file} were begun with other settings ({', '.join(changed)}); give the same again, "
                "or delete this file to begin again"
            )
        for line in lines[1:]:
            self.captions |= line.get("captions", {})
            self.problems |= line.get("problems", {})

    def knows(self, image: str) -> bool:
        return image in self.captions or image in self.problems

    def add(self, captions: Mapping[str, str], problems: Mapping[str, str]) -> None:
        """Record a batch, so that a process that is killed from now on does not lose it."""
        self._append({"captions": dict(captions), "problems": dict(problems)})
        self.captions |= captions
        self.problems |= problems

    def delete(self) -> None:
        self._file.unlink()

    def _lines(self) -> list[dict[str, Any]]:
        """Return the complete lines, and cut off what a killed process has written of another one."""
        if not self._file.is_file():
            return []
        content = self._file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self._file.open("r+b") as file:
                file.truncate(len(whole))
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise UserError(f"{self._file} is damaged ({error}); delete it to begin again") from None

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._file.open("ab") as file:
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
