"""caption_images.py is killed, or its disk is full, before a change of the file system; then it is typed again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.crash_points import disturb
from tests.faults.lab import Command
from tests.faults.shim import FULL_ONCE, KILL, Fault
from tests.support.runs import ROOT
from tests.support.tiny_captioners import save_git
from tests.support.tiny_captions import picture

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> Command:
    """Five images, of which a table captions one, and a model for the others."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "images").mkdir()
    for i in range(5):
        picture(i, (40, 30)).save(folder / f"images/{i}.png")
    (folder / "images/metadata.csv").write_text(
        "file_name,text\n0.png,mine\n" + "".join(f"{i}.png,\n" for i in range(1, 5))
    )
    words = (str(folder / "images"), str(save_git(folder / "model")))
    return Command("scans", ROOT / "tests/faults/caption_a_copy.py", words)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("fault", "every"), [(KILL, 2), (FULL_ONCE, 4)], ids=["kill", "full"])
def test_nothing_is_lost(lab, command, fault: Fault, every: int):
    trials = list(disturb(lab, command, fault, every))
    assert len(trials) > 4
    assert [str(trial) for trial in trials if trial.problems] == []
    assert Path(lab.reference, "scans/__captions/before_1/metadata.csv").is_file()
