"""The archive on a task without posters: what it keeps and measures, that it is reproducible, and that it searches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from training.innovation.archive import EMITTERS, ArchiveSettings, PosterArchive
from training.innovation.space import reflected

SETTINGS = ArchiveSettings(
    dimensions=10, measures=2, cells=20, emitter="cma_me", num_emitters=2, batch_size=40, sigma=0.2, seed=0
)


def answers(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A smooth task: the mean of some coordinates are the measures, and the others should be 0.7."""
    inside = reflected(points)
    measures = np.stack([inside[:, :3].mean(1), inside[:, 3:6].mean(1)], 1)
    return 1 - np.abs(inside[:, 6:] - 0.7).mean(1), measures


def searched(batches: int, archive: PosterArchive) -> list[np.ndarray]:
    proposed = []
    for _ in range(batches):
        proposed.append(archive.propose())
        archive.tell(*answers(proposed[-1]))
    return proposed


@pytest.mark.parametrize("emitter", EMITTERS)
def test_a_replayed_archive_is_the_same_and_stays_the_same(emitter):
    settings = dataclasses.replace(SETTINGS, emitter=emitter)
    undisturbed, resumed = PosterArchive(settings), PosterArchive(settings)
    proposed = searched(12, undisturbed)
    for points in proposed[:5]:
        assert resumed.replay(points, *answers(points))
    assert resumed.evaluations == 200
    for points, again in zip(proposed[5:], searched(7, resumed), strict=True):
        assert np.array_equal(points, again)
    assert resumed.statistics() == undisturbed.statistics()
    elites = zip(undisturbed.elites(), resumed.elites(), strict=True)
    assert all(np.array_equal(one["point"], other["point"]) for one, other in elites)
    assert {elite["evaluation"] for elite in resumed.elites()} <= set(range(480))


def test_the_record_of_another_search_is_not_replayed():
    archive = PosterArchive(SETTINGS)
    points = PosterArchive(dataclasses.replace(SETTINGS, seed=1)).propose()
    assert not archive.replay(points, *answers(points))
    assert not archive.replay(points[:10], *answers(points[:10]))
    assert archive.evaluations == 0


def test_coverage_and_qd_score_against_values_by_hand():
    archive = PosterArchive(dataclasses.replace(SETTINGS, emitter="random", cells=2, batch_size=8))
    archive.propose()
    quality = np.array([0.5, 0.8, 0.2, 0.0, 0, 0, 0, 0])
    # Two posters in the first cell, of which the better one is kept, one in another, and copies in a third.
    places = [[0.1, 0.1], [0.2, 0.2], [0.9, 0.1], *[[0.9, 0.9]] * 5]
    archive.tell(quality, np.array(places))
    assert archive.statistics() == pytest.approx(
        {"coverage": 2 / 4, "qd_score": 0.8 + 0.2, "best_quality": 0.8, "mean_quality": 0.5}
    )
    assert [(elite["evaluation"], elite["cell"]) for elite in archive.elites()] == [(1, (0, 0)), (2, (1, 0))]


def test_an_archive_without_posters_has_statistics():
    empty = PosterArchive(SETTINGS)
    assert empty.elites() == []
    assert empty.statistics() == {"coverage": 0, "qd_score": 0, "best_quality": 0, "mean_quality": 0}


def test_both_searches_find_more_than_random_search():
    """For each of three seeds, after 1,000 evaluations."""
    for seed in range(3):
        scores = {}
        for emitter in EMITTERS:
            archive = PosterArchive(dataclasses.replace(SETTINGS, emitter=emitter, seed=seed))
            searched(25, archive)
            scores[emitter] = archive.statistics()["qd_score"]
        assert scores["cma_me"] > scores["random"]
        assert scores["gaussian"] > scores["random"]


def test_three_and_four_measures():
    for measures in (3, 4):
        archive = PosterArchive(dataclasses.replace(SETTINGS, measures=measures, cells=5))
        points = archive.propose()
        archive.tell(np.ones(40), reflected(points)[:, :measures])
        assert archive.statistics()["coverage"] == len(archive.elites()) / 5**measures
