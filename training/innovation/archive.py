"""The archive of posters and what proposes new ones, with pyribs.

N proposals, n dimensions of the space, m measures. All random numbers come from the seed, and pyribs is deterministic:
the same answers to the same proposals lead to the same state. So a search that is resumed proposes again what it
proposed before, and gets the recorded answers; no state of pyribs is saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.tools.cli import UserError
from pipelines.tools.commands import install_command
from training.core.draws import mix

if TYPE_CHECKING:
    from ribs.archives import GridArchive
    from ribs.schedulers import Scheduler

EMITTERS = ("cma_me", "gaussian", "random")
QD_SCORE_OFFSET = 0.0
"""Subtracted from each quality in the QD score. Qualities are at least 0, so that each poster adds to the score."""
# The sum of many small differences between machines; a proposal of another search differs by far more.
SAME = 1e-6


@dataclass(frozen=True)
class ArchiveSettings:
    """What determines a search, apart from the answers.

    Args:
        measures: number of measures, each in [0, 1].
        cells: number of cells along each measure.
        emitter: one of EMITTERS: `cma_me` adapts the covariance of its steps to what improves the archive (Fontaine et
            al. 2020), `gaussian` varies elites by steps of a fixed size (MAP-Elites, Mouret and Clune 2015), `random`
            draws every point uniformly.
        sigma: standard deviation of the (first) steps.
        batch_size: number of proposals at a time, divided among `num_emitters`.
    """

    dimensions: int
    measures: int
    cells: int
    emitter: str
    num_emitters: int
    batch_size: int
    sigma: float
    seed: int


class PosterArchive:
    """A grid over the measures whose cells keep the best poster each, and the emitters that propose points.

    Raises:
        UserError: pyribs is not installed.
    """

    def __init__(self, settings: ArchiveSettings):
        require_ribs()
        from ribs.archives import GridArchive
        from ribs.schedulers import Scheduler

        self.settings = settings
        self.grid: GridArchive = GridArchive(
            solution_dim=settings.dimensions,
            dims=[settings.cells] * settings.measures,
            ranges=[(0.0, 1.0)] * settings.measures,
            qd_score_offset=QD_SCORE_OFFSET,
            seed=mix(settings.seed, "archive"),
            extra_fields={"evaluation": ((), np.int64)},
        )
        self._scheduler: Scheduler = Scheduler(self.grid, _emitters(self.grid, settings))
        self.evaluations = 0
        self._proposed: np.ndarray | None = None

    def propose(self) -> np.ndarray:
        """Return the next points to evaluate, N × n; the same ones until `tell` is called."""
        if self._proposed is None:
            self._proposed = np.asarray(self._scheduler.ask(), dtype=np.float64).copy()
        return self._proposed

    def tell(self, quality: np.ndarray, measures: np.ndarray) -> None:
        """Add the posters of the proposed points: their qualities (N) and measures (N × m)."""
        numbers = np.arange(self.evaluations, self.evaluations + len(quality))
        self._scheduler.tell(quality, measures, evaluation=numbers)
        self.evaluations += len(quality)
        self._proposed = None

    def replay(self, points: np.ndarray, quality: np.ndarray, measures: np.ndarray) -> bool:
        """Tell the archive a recorded batch; return False, without doing so, if it proposes other points now."""
        proposed = self.propose()
        if proposed.shape != points.shape or not np.allclose(proposed, points, rtol=0, atol=SAME):
            return False
        self.tell(quality, measures)
        return True

    def elites(self) -> list[dict[str, Any]]:
        """Return the posters in the archive, best first, each as quality, measures, point, its number and its cell.

        Copies of training posters have quality 0 and are left out: the grid of pyribs keeps them where it has no other.
        """
        data: Mapping[str, np.ndarray] = self.grid.data(return_type="dict")
        order = np.lexsort((data["evaluation"], -data["objective"]))
        cells: Any = self.grid.int_to_grid_index(data["index"]) if len(order) else []
        return [
            {
                "quality": float(data["objective"][row]),
                "measures": data["measures"][row],
                "point": data["solution"][row],
                "evaluation": int(data["evaluation"][row]),
                "cell": tuple(map(int, cells[row])),
            }
            for row in order
            if data["objective"][row] > 0
        ]

    def statistics(self) -> dict[str, float]:
        """Return coverage (fraction of cells with a poster), QD score (sum of qualities), best and mean quality."""
        qualities = np.asarray(self.grid.data("objective"))
        qualities = qualities[qualities > 0]
        return {
            "coverage": len(qualities) / int(self.grid.cells),
            "qd_score": float((qualities - QD_SCORE_OFFSET).sum()),
            "best_quality": float(qualities.max(initial=0.0)),
            "mean_quality": float(qualities.mean()) if len(qualities) else 0.0,
        }


def require_ribs() -> str:
    """Import pyribs, and return its version. Raises UserError if it is not installed.

    Numba does not compile its two functions: that takes seven seconds at each start, and they are NumPy's own on a few
    numbers.
    """
    try:
        import numba

        settings: Any = numba.config
        compiles, settings.DISABLE_JIT = settings.DISABLE_JIT, 1
        try:
            import ribs
        finally:
            settings.DISABLE_JIT = compiles
    except ImportError:
        raise UserError(
            f"the search needs pyribs, which is not installed: {install_command('innovate', 'ribs')}"
        ) from None
    return str(ribs.__version__)


def _emitters(grid: GridArchive, settings: ArchiveSettings) -> list[Any]:
    from ribs.emitters import EmitterBase, EvolutionStrategyEmitter, GaussianEmitter

    class UniformEmitter(EmitterBase):
        """Random search: proposes points of the unit cube independently of the archive."""

        def __init__(self, archive: GridArchive, batch_size: int, seed: int):
            super().__init__(
                archive, solution_dim=archive.solution_dim, bounds=None, lower_bounds=None, upper_bounds=None
            )
            self._shape = batch_size, settings.dimensions
            self._rng = np.random.default_rng(seed)

        def ask(self) -> np.ndarray:
            return self._rng.random(self._shape)

    sizes = [len(part) for part in np.array_split(np.arange(settings.batch_size), settings.num_emitters)]
    center = np.full(settings.dimensions, 0.5)
    emitters: list[Any] = []
    for number, size in enumerate(sizes):
        seed = mix(settings.seed, "emitter", number)
        if settings.emitter == "random":
            emitters.append(UniformEmitter(grid, size, seed))
        elif settings.emitter == "gaussian":
            # The first batch is uniform: copies of one point would all land in one cell.
            first = np.random.default_rng(mix(seed, "first")).random((size, settings.dimensions))
            emitters.append(
                GaussianEmitter(grid, sigma=settings.sigma, initial_solutions=first, batch_size=size, seed=seed)
            )
        else:
            emitters.append(
                EvolutionStrategyEmitter(
                    grid, x0=center, sigma0=settings.sigma, ranker="2imp", batch_size=size, seed=seed
                )
            )
    return emitters
