"""Search for design briefs whose posters are good and different: quality–diversity search with a poster decoder.

    python training/innovate.py                        # makes all that it needs
    python training/innovate.py --compare true
    python training/innovate.py --export top:64
    python training/innovate.py --model runs/posters/decoder_64 --reader runs/posters/abstractor_64

A decoder paints a poster for each brief, and a reader reads it. An archive keeps the best poster for each combination
of two to four measures, such as balance and density. Run the same command again to resume the search.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.common.design_brief import FIELDS, DesignBrief
from pipelines.tools.cli import UserError, entry_point
from pipelines.tools.devices import get_device
from pipelines.tools.resources import BRIEFS, find_file
from training.core.files import write_json
from training.core.options import option
from training.core.parsing import parse_config
from training.core.previews import save_png
from training.engine.prepare import PrepareConfig, described, make_missing, missing_inputs
from training.engine.signals import Interrupted, StopSignal
from training.evaluation.adherence import load_reader
from training.evaluation.data import EvaluationDataConfig, open_evaluation_data, run_settings
from training.innovation.archive import EMITTERS, ArchiveSettings, PosterArchive, require_ribs
from training.innovation.drawing import draw_comparison
from training.innovation.export import export, parse_export
from training.innovation.originality import copy_test
from training.innovation.painting import Studio
from training.innovation.search import opened_search
from training.innovation.space import BriefSpace, check_measures
from training.metrics.generators import SamplingConfig, generator_of
from training.recipes.options import budget_seconds

BASELINE = "random"
# The default decoder and reader are trained if they are missing, as the inputs of training are.
RECIPES = {
    "runs/posters/decoder_plain_64/pipeline": "training/train_decoder.py --config "
    "configs/experiments/posters/decoder_plain_64.yaml",
    "runs/posters/abstractor_plain_64/pipeline": "training/train_abstractor.py --config "
    "configs/experiments/posters/abstractor_plain_64.yaml",
}


@dataclass
class Config(PrepareConfig, SamplingConfig):
    """Flags of innovate.py."""

    prepare: dict[str, str] = option(RECIPES, on_resume="free")
    """Mapping from a path to the script of this project, with its flags, that creates it if it is --model or --reader
    and is missing"""

    model: str = option("runs/posters/decoder_plain_64", on_resume="free", essential=True)
    """Poster decoder: a run of train_decoder.py, a checkpoint, pipeline folder or Hub id"""
    reader: str = option("runs/posters/abstractor_plain_64", on_resume="free", essential=True)
    """Model that reads the posters: a run of train_abstractor.py with --encoder"""
    output_dir: str = option("runs/innovation", on_resume="free", essential=True)
    """Folder of the search: its record, the archive and its images; a search in it is resumed"""
    measures: list[str] = option(["balance", "density"], essential=True)
    """Two to four measures that span the archive: grammar numbers as read from the poster, or the style axes energy,
    formality and warmth of its brief"""
    fields: list[str] = option(list(FIELDS), essential=True)
    """Fields of the brief that the search chooses"""
    brief: str | None = option(None, on_resume="free", essential=True)
    """YAML file with fields of the brief that are fixed for all posters; fields that are neither here nor in --fields
    are left to the decoder"""
    noises: int = option(16, at_least=1)
    """Number of initial noises (seeds 0, 1, …) that the search chooses between"""
    evaluations: int = option(1000, on_resume="free", at_least=1, essential=True)
    """Number of posters to evaluate in all sessions, rounded up to whole batches"""
    time_budget: str | None = option(None, on_resume="free", essential=True)
    """Time for this session, such as 30m, 1h30m or overnight; if unset, unlimited"""
    emitter: str = option("gaussian", choices=EMITTERS, essential=True)
    """What proposes points: gaussian varies the posters in the archive (MAP-Elites), cma_me adapts its steps to what
    improves the archive, random draws briefs at random (the baseline)"""
    num_emitters: int = option(2, at_least=1)
    """Number of emitters that a batch is divided among"""
    batch_size: int = option(40, at_least=4)
    """Number of posters that are painted at a time"""
    sigma: float = option(0.2, above=0, at_most=1)
    """Standard deviation of the (first) steps, where each field ranges from 0 to 1"""
    cells: int = option(20, at_least=2, at_most=1000)
    """Number of cells of the archive along each measure"""
    num_inference_steps: int | None = option(10, at_least=1, essential=True)
    """Number of sampling steps"""
    seed: int = option(0, at_least=0, essential=True)
    """Random seed of the search"""
    check_copies: bool = option(True)
    """Compare each poster with the training posters of the decoder; a copy has quality 0"""
    dataset_name: str | None = option(None, on_resume="free")
    """Posters that the decoder was trained on, for --check_copies; if unset, the data of its run"""
    max_training_images: int = option(10_000, at_least=2)
    """Maximum number of training posters, evenly spaced, that posters are compared with"""
    export: str | None = option(None, on_resume="free", essential=True)
    """top:N writes the N best posters of the archive, with their briefs, as a dataset for train_decoder.py"""
    export_dir: str | None = option(None, on_resume="free")
    """Folder for --export; if unset, exported/ in the folder of the search"""
    compare: bool = option(False, on_resume="free", essential=True)
    """Search with --num_seeds seeds, each of them also at random, and draw all searches in one image"""
    num_seeds: int = option(3, on_resume="free", at_least=1)
    """Number of seeds of --compare, from --seed on"""
    device: str | None = option(None, on_resume="free")
    """Device for the models: cpu, cuda, cuda:1, mps, ...; if unset, the GPU if there is one, otherwise the CPU"""
    overwrite: bool = option(False, on_resume="free", essential=True)
    """Start again although the folder contains a search; the old one is renamed, not deleted"""
    dry_run: bool = option(False, on_resume="free", essential=True)
    """Check everything, paint one batch without saving it, and say how long the search will take"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        check_measures(self.measures, self.space())
        budget_seconds(self.time_budget)
        parse_export(self.export)
        if self.batch_size < 4 * self.num_emitters:
            raise UserError(
                f"--batch_size {self.batch_size} gives fewer than 4 posters to each of --num_emitters "
                f"{self.num_emitters}; use larger batches or fewer emitters"
            )
        if self.compare and (self.emitter == BASELINE or self.export):
            other = f"--export {self.export}" if self.export else f"--emitter {self.emitter}"
            raise UserError(f"--compare compares an emitter with random search; leave out {other}")

    def space(self) -> BriefSpace:
        """Return the space of briefs. Raises UserError if the file of --brief or a field is wrong, or none is free."""
        try:
            fixed = DesignBrief.from_yaml(find_file(self.brief, BRIEFS)) if self.brief else DesignBrief()
        except ValueError as error:
            raise UserError(str(error)) from None
        return BriefSpace(tuple(self.fields), fixed, self.noises)

    def settings(self) -> ArchiveSettings:
        """Return what determines the proposals."""
        return ArchiveSettings(
            len(self.space().axes), len(self.measures), self.cells, self.emitter, self.num_emitters, self.batch_size,
            self.sigma, self.seed,
        )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(Config, argv, description=__doc__)
    require_ribs()
    get_device(config.device)
    started = time.monotonic()
    with StopSignal() as stop:
        try:
            missing = missing_inputs(config.recipes())
            if missing:
                print("\n".join(described(missing)), flush=True)
                if config.dry_run:
                    return 0
            make_missing(missing, lambda: stop.requested)
            with stop.at_once():
                studio = open_studio(config, stop.check)
            if config.dry_run:
                print("\n".join(describe(config, studio, stop.check)))
            elif config.compare:
                compare(config, studio, started, stop.check)
            else:
                search_once(config, studio, started, stop.check)
        except Interrupted:
            print(f"stopped; run the same command again to resume the search in {config.output_dir}")
            return stop.exit_status(stop.requested or signal.SIGTERM)
    return 0


def open_studio(config: Config, poll: Callable[[], None]) -> Studio:
    """Load decoder, reader and training posters.

    Raises:
        UserError: one of them does not exist or is something else.
    """
    from pipelines.tools.loading import load_on_device

    names = [field.name for field in dataclasses.fields(SamplingConfig)]
    # Noise k is that of seed k, so that all searches choose between the same noises.
    sampling = SamplingConfig(**{**{name: getattr(config, name) for name in names}, "seed": 0})
    decoder = load_on_device(config.model, config.device)
    if not hasattr(decoder, "brief_encoder") or hasattr(decoder, "controlnet"):
        raise UserError(f"--model {config.model} is a {type(decoder).__name__}; give a run of train_decoder.py")
    generator = generator_of(decoder, sampling)
    reader = load_reader(config.reader, config.device)
    copies = None
    if config.check_copies:
        data = EvaluationDataConfig(dataset_name=config.dataset_name, max_training_images=config.max_training_images)
        copies = copy_test(open_evaluation_data(data, run_settings(config.model), generator), poll)
    return Studio(generator, reader, copies, config.space(), config.measures)


def search_once(config: Config, studio: Studio, started: float, poll: Callable[[], None]) -> list[dict[str, float]]:
    """Search until the budget is used, draw the archive, export it if requested, and return the history."""
    budget = budget_seconds(config.time_budget)
    with opened_search(config, config.output_dir, config.overwrite, studio, config.settings()) as search:
        if search.evaluations:
            print(f"resuming the search in {search.folder.path} after {search.evaluations:,} posters")
        remaining = max(budget - (time.monotonic() - started), 1e-3) if budget else 0.0
        search.run(config.evaluations, remaining, poll)
        written = search.draw()
        now = search.statistics()
        print(
            f"{search.evaluations:,} posters, {now['copies']:,.0f} of them copies: coverage {now['coverage']:.1%}, QD "
            f"score {now['qd_score']:.2f}, best quality {now['best_quality']:.3f}, mean {now['mean_quality']:.3f}"
        )
        if search.evaluations < config.evaluations:
            print(f"the time budget is used; run the same command again for the rest of {config.evaluations:,} posters")
        if count := parse_export(config.export):
            folder = Path(config.export_dir) if config.export_dir else search.folder.path / "exported"
            print(f"exported {export(search, count, folder):,} posters with their briefs to {folder}")
        print("\n".join(map(str, written)))
        return search.history


def compare(config: Config, studio: Studio, started: float, poll: Callable[[], None]) -> None:
    """Search with each seed, by the emitter and at random, and draw the courses of all searches in one image."""
    courses: dict[str, list[list[dict[str, float]]]] = {config.emitter: [], BASELINE: []}
    for seed in range(config.seed, config.seed + config.num_seeds):
        for emitter, histories in courses.items():
            folder = str(Path(config.output_dir) / f"{emitter}_seed_{seed}")
            print(f"\n{folder}", flush=True)
            one = dataclasses.replace(config, emitter=emitter, seed=seed, output_dir=folder, compare=False)
            histories.append(search_once(one, studio, started, poll))
    if not all(history for histories in courses.values() for history in histories):
        print("\nthe time budget is used before each search has begun; run the same command again")
        return
    image = save_png(draw_comparison(courses), Path(config.output_dir) / "comparison.png")
    last = {name: [history[-1] for history in histories] for name, histories in courses.items()}
    write_json(image.with_suffix(".json"), last)
    print()
    for name, rows in last.items():
        values = [
            f"{column} {_mean([row[column] for row in rows])}" for column in ("coverage", "qd_score", "best_quality")
        ]
        print(f"{name:10}{rows[0]['evaluations']:,} posters, {len(rows)} seeds: {', '.join(values)}")
    print(image)


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def describe(config: Config, studio: Studio, poll: Callable[[], None]) -> list[str]:
    """Paint one batch without saving it, and return in words what the search will be and how long it will take."""
    archive = PosterArchive(config.settings())
    begun = time.monotonic()
    batch = studio(archive.propose(), poll)
    seconds = time.monotonic() - begun
    batches = -(-config.evaluations // config.batch_size) * (2 * config.num_seeds if config.compare else 1)
    copies = studio.copies
    return [
        f"{len(studio.space.axes)} dimensions: {', '.join(studio.space.axes)}",
        f"archive of {config.cells ** len(config.measures):,} cells over {', '.join(config.measures)}",
        "no test of copies"
        if copies is None
        else f"a poster is a copy if its ratio is below {copies.threshold:.3f} (false positives: "
        f"{copies.false_positive_rate:.1%})",
        f"the first batch has a mean quality of {batch['quality'].mean():.3f}: obedience "
        f"{batch['obedience'].mean():.3f}, layout {batch['layout'].mean():.3f}, {int(batch['is_copy'].sum())} copies",
        f"a batch of {config.batch_size} posters takes {seconds:.1f} seconds; {batches:,} batches take about "
        f"{batches * seconds / 60:.0f} minutes",
    ]


if __name__ == "__main__":
    entry_point(main)
