"""A search in its folder: it is begun or resumed, evaluates batches until its budget is used, and is drawn.

config.yaml   the settings
search.json   what may not change: hashes of the models and posters, the space of briefs, the version of pyribs
batches/      one file for each batch of posters (`Records`)
progress.csv  coverage, QD score and qualities after each batch
archive.json  the posters in the archive: brief, quality, measures, cell
archive.png   heat map of the qualities
wall.png      the posters in their cells
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.tools.cli import UserError
from pipelines.tools.progress import Progress
from training.core.files import FULL_DISK, read_json_object, write_atomically, write_json
from training.core.options import Options
from training.core.previews import save_png
from training.innovation.archive import ArchiveSettings, PosterArchive, require_ribs
from training.innovation.drawing import draw_heat_map, draw_wall
from training.innovation.painting import Studio
from training.innovation.records import Records
from training.run.folder import RunFolder

IDENTITY, PROGRESS = "search.json", "progress.csv"
ARCHIVE, HEAT_MAP, WALL = "archive.json", "archive.png", "wall.png"
COLUMNS = ("evaluations", "coverage", "qd_score", "best_quality", "mean_quality", "copies")
_CHANGED = {
    "decoder": "another decoder (--model)",
    "reader": "another reader (--reader)",
    "training posters": "other training posters (--dataset_name)",
    "briefs": "another space of briefs (--fields, --brief, --noises)",
}


class Search:
    """One search in a folder, which is locked by `opened_search`.

    Args:
        studio: paints and judges posters.
    """

    def __init__(self, folder: RunFolder, studio: Studio, settings: ArchiveSettings):
        self.folder, self.studio, self.settings = folder, studio, settings
        self.archive = PosterArchive(settings)
        self.records = Records(folder.path, settings.batch_size)
        self.history: list[dict[str, float]] = []
        self._copies = 0

    @property
    def evaluations(self) -> int:
        """Number of posters evaluated so far, in all sessions."""
        return self.archive.evaluations

    def restore(self) -> None:
        """Bring the archive to the state after the last recorded batch.

        Raises:
            UserError: a record is damaged, or pyribs does not propose the recorded points.
        """
        for number, batch in enumerate(self.records):
            if not self.archive.replay(batch["points"], batch["quality"], batch["measures"]):
                known = (read_json_object(self.folder.path / IDENTITY) or {}).get("ribs")
                raise UserError(
                    f"{self.folder.path} cannot be resumed: batch {number} was made with pyribs {known}, and pyribs "
                    f"{require_ribs()} proposes other points; install that version (pip install ribs=={known}), or "
                    "choose another --output_dir"
                )
            self._note(batch)

    def run(self, evaluations: int, seconds: float, poll: Callable[[], None]) -> None:
        """Evaluate batches until there are this many posters, or this session has used its time.

        Args:
            evaluations: number of posters of all sessions; the last batch is always complete.
            seconds: time of this session; 0 is unlimited.
            poll: called between the parts of a batch; it may raise to stop, which loses this batch only.
        """
        started, longest = time.monotonic(), 0.0
        with Progress(evaluations, "poster", "search", done=self.evaluations, facts=self._facts) as progress:
            while self.evaluations < evaluations:
                before = time.monotonic()
                if seconds and before - started + longest > seconds:
                    break
                poll()
                batch = self.studio(self.archive.propose(), poll)
                self.records.append(batch)
                self.archive.tell(batch["quality"], batch["measures"])
                self._note(batch)
                self._write_progress()
                longest = max(longest, time.monotonic() - before)
                progress.update(len(batch["quality"]))

    def draw(self) -> list[Path]:
        """Write the archive as a table, a heat map and a wall of posters, and return the files."""
        elites, path = self.archive.elites(), self.folder.path
        briefs, noises = (
            self.studio.space.decode(np.stack([elite["point"] for elite in elites])) if elites else ([], [])
        )
        write_json(
            path / ARCHIVE,
            {
                "measures": list(self.studio.measures),
                **self.statistics(),
                "posters": [
                    {
                        "evaluation": elite["evaluation"],
                        "quality": elite["quality"],
                        "measures": elite["measures"].tolist(),
                        "cell": elite["cell"],
                        "noise": noise,
                        "brief": brief.to_dict(),
                    }
                    for elite, brief, noise in zip(elites, briefs, noises, strict=True)
                ],
            },
        )
        grid = (self.settings.cells, self.studio.measures)
        save_png(draw_heat_map(elites, *grid), path / HEAT_MAP)
        save_png(draw_wall(elites, self.records.poster, *grid), path / WALL)
        return [path / name for name in (HEAT_MAP, WALL, ARCHIVE)]

    def statistics(self) -> dict[str, float]:
        """Return the number of evaluations, what `PosterArchive.statistics` returns, and the number of copies."""
        return {"evaluations": self.evaluations, **self.archive.statistics(), "copies": self._copies}

    def _note(self, batch: dict[str, np.ndarray]) -> None:
        self._copies += int(batch["is_copy"].sum())
        self.history.append(self.statistics())

    def _write_progress(self) -> None:
        text = io.StringIO()
        table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(self.history)
        write_atomically(self.folder.path / PROGRESS, text.getvalue())

    def _facts(self) -> list[str]:
        if not self.history:
            return []
        now = self.history[-1]
        return [f"coverage {now['coverage']:.1%}", f"QD score {now['qd_score']:.1f}", f"best {now['best_quality']:.3f}"]


@contextmanager
def opened_search(
    config: Options, output_dir: str, overwrite: bool, studio: Studio, settings: ArchiveSettings
) -> Iterator[Search]:
    """Yield the search in a folder, begun or restored, while this process holds the lock of the folder.

    Raises:
        UserError: another process searches there, the folder holds something else, or settings or models differ from
            those of the search in it, or the disk is full.
    """
    folder = RunFolder(output_dir)
    if overwrite and (aside := folder.set_aside()) is not None:
        print(f"the earlier search is now in {aside}")
    folder.lock.refusal = f"another process searches in {folder.path}; wait for it, or choose another --output_dir"
    saved = folder.saved_config()
    begun = {path.name for path in folder.path.iterdir()} if folder.path.is_dir() else set()
    if saved is None and begun - {".lock", IDENTITY}:  # a process that was killed at its start leaves these
        raise UserError(f"--output_dir {folder.path} is not empty and has no search in it; choose another folder")
    own = {"briefs": studio.space.describe(), **studio.fingerprint()}
    if saved is not None:
        _check_same(folder, config, saved, own)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.lock.acquire()
    except OSError as error:
        raise UserError(f"--output_dir {folder.path} cannot be written ({error.strerror}); choose another") from None
    try:
        if saved is None:
            write_json(folder.path / IDENTITY, {**own, "ribs": require_ribs()})
        folder.save_config(config.to_dict())
        search = Search(folder, studio, settings)
        search.restore()
        yield search
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise UserError(
            f"the disk of {folder.path} is full; make room, and run the same command again to resume the search"
        ) from error
    finally:
        folder.release()


def _check_same(folder: RunFolder, config: Options, saved: dict[str, Any], own: dict[str, str]) -> None:
    known = read_json_object(folder.path / IDENTITY)
    if known is None:
        raise UserError(
            f"--output_dir {folder.path} has a config.yaml but no {IDENTITY}: it is not a search; choose another folder"
        )
    fix = "choose another --output_dir, or add --overwrite true to set the earlier search aside"
    changed = [_CHANGED[name] for name, value in own.items() if known.get(name) != value]
    if changed:
        raise UserError(f"the archive in {folder.path} was made with {' and '.join(changed)}; {fix}")
    if errors := config.changes_from(saved)["error"]:
        raise UserError(f"the archive in {folder.path} was made with other settings: {'; '.join(errors)}; {fix}")
