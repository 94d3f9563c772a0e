"""docs/metrics.md defines every metric that evaluate.py and the validation of the stages can write, and no others."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_scripts.posters.grammar import design_grammar
from data_scripts.posters.records import PosterOptions, make_row
from tests.conftest import ROOT
from training.innovation.search import COLUMNS
from training.metrics.captions import alignment_metrics, caption_scores, retrieval_metrics
from training.metrics.colors import color_statistics
from training.metrics.control import control_metrics
from training.metrics.cycle import cycle_metrics
from training.metrics.images import psnr, ssim
from training.metrics.memorization import CopyReport, ReplayReport
from training.metrics.posters import measure_posters
from training.metrics.quality import measure_distances
from training.objectives.diffusion import NOISE_BANDS, noise_level_metrics
from training.stages.generating import SHOWN

PAGE = ROOT / "docs/metrics.md"
FOLDERS = ("metrics", "evaluation", "objectives", "models", "stages")
# Functions whose results are put into others under other names, which the page has in words.
NOT_METRICS = {"_spread", "_floor_of", "_measured_before", "_read_by_all", "_of_real_posters", "restart_levels"}
# Keys in those functions of what is put into names, or taken out of the result again.
NO_NAMES = {"control", "shuffled", "base", "real", "", "_mean_colour", "_pasted", "_real", "conditioning_pixel_values"}
NO_NAMES |= {"references", "predictions", "image_names", "similarity", "images"}
# Functions with other results beside numbers, so that their annotation does not say that these are metrics.
WITH_OTHERS = {("captions.py", name) for name in ("_metrics", "_over_batches", "measure_captions")}
WITH_OTHERS |= {("generated.py", "_compared")}
NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*(_…)?")
ANY_NAME = r"[a-z0-9_]*"


def written_in_the_code() -> Iterator[tuple[str, str]]:
    """Yield (place, pattern of a name) of each metric in the functions that return metrics; f-strings are patterns."""
    files = [*(ROOT / "training").glob("*.py"), *(file for name in FOLDERS for file in _files(name))]
    for file in sorted(files):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            returned = ast.unparse(function.returns) if function.returns else ""
            is_one = "dict[str, float]" in returned or (file.name, function.name) in WITH_OTHERS
            if is_one and function.name not in NOT_METRICS:
                for key in _keys(function):
                    if key not in NO_NAMES:
                        yield f"{file.name}: {function.name}", key


def _files(folder: str) -> Iterator[Path]:
    return (ROOT / "training" / folder).glob("*.py")


def _keys(function: ast.FunctionDef) -> Iterator[str]:
    written: list[ast.AST | None] = []
    for node in ast.walk(function):
        if isinstance(node, ast.Dict):
            written += node.keys
        elif isinstance(node, ast.DictComp):
            # `{name: … for name in ("psnr", "ssim")}`
            written += [node.key, *(part for loop in node.generators for part in ast.walk(loop.iter))]
        elif isinstance(node, ast.Assign):
            written += [target.slice for target in node.targets if isinstance(target, ast.Subscript)]
    for key in written:
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            yield re.escape(key.value)
        elif isinstance(key, ast.JoinedStr):
            parts = [re.escape(str(part.value)) if isinstance(part, ast.Constant) else ANY_NAME for part in key.values]
            if "".join(parts) != ANY_NAME:
                yield "".join(parts)


def returned_by_the_functions() -> set[str]:
    """Return the names in the results of functions that compute metrics, of tiny inputs."""
    torch.manual_seed(0)
    images = [Image.fromarray(np.full((64, 64, 3), shade, dtype=np.uint8)) for shade in (20, 200)]
    row = make_row(PosterOptions(0, 64, "plain"), 0)
    cosines, grammar, counts = np.eye(4), np.random.default_rng(0).random((4, 8)), np.array([1, 2, 1, 2])
    names: set[str] = set(measure_distances(torch.randn(9, 2), torch.randn(9, 2)).values)
    names |= set(color_statistics(images))
    names |= set(caption_scores(["a cat"], [["a cat"]]))
    names |= set(retrieval_metrics(cosines, cosines > 0))
    names |= {f"{prefix}{name}" for prefix in ("", "caption_") for name in alignment_metrics(cosines, cosines > 0)}
    names |= set(cycle_metrics(grammar, grammar, counts, counts, np.eye(4)))
    names |= set(measure_posters(images[:1], [row], images[1:]))
    of_bands = {f"{what}_noise_{band}": 1.0 for band in NOISE_BANDS for what in ("count", "loss")}
    names |= set(noise_level_metrics(of_bands))
    names |= set(control_metrics(_ones()))
    names |= set(design_grammar([])) | {f"eval_{name}" for name in SHOWN} | {"eval_diversity"}
    of_cycle = ("cycle_score", "grammar_correlation", "picture_count_share", "palette_distance")
    names |= {f"eval_{name}" for name in of_cycle}
    texts = ("space", "calibrated_on")
    reports = [*dataclasses.fields(CopyReport), *dataclasses.fields(ReplayReport)]
    return names | {field.name for field in reports if field.name not in texts} | (set(COLUMNS) - {"evaluations"})


def _ones() -> dict[str, float]:
    sums = ("count", "true", "none", "shuffled", "power", "change_none", "change_shuffled", "gain", "gain_squares")
    return dict.fromkeys((*sums, "read", "iou", "iou_shuffled", "iou_gain", "iou_gain_squares"), 1.0)


def defined_on_the_page() -> set[str]:
    """Return the names in the first two cells of the tables, and those in formulas and sentences."""
    return {name for name in re.findall(r"`([^`]+)`", PAGE.read_text(encoding="utf-8")) if NAME.fullmatch(name)}


def names_in_tables() -> set[str]:
    """Return the names that the page defines in its tables: in the first cell, or in the second one of a loss."""
    found: set[str] = set()
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = line.split(" | ")
        if line.startswith("| ") and len(cells) > 1:
            named = cells[0] if "`" in cells[0] else cells[1]
            found |= {name for name in re.findall(r"`([^`]+)`", named) if NAME.fullmatch(name) and "…" not in name}
    return found


WRITTEN = sorted(set(written_in_the_code()))


def test_metrics_of_every_kind_were_collected():
    patterns = {pattern for _, pattern in WRITTEN}
    assert {"val_psnr", "psnr", "invented_alignment", "drawn_psnr", "val_sample_error"} <= patterns
    assert {"kid", "bleu_4", "val_control_iou", "val_loss_noise_0_25"} <= returned_by_the_functions()
    assert len(WRITTEN) > 60


@pytest.mark.parametrize(("place", "pattern"), WRITTEN)
def test_every_metric_of_the_code_is_on_the_page(place, pattern):
    assert any(re.fullmatch(pattern, name) for name in defined_on_the_page()), f"{place} writes {pattern}"


def test_every_name_that_is_put_together_is_on_the_page():
    assert returned_by_the_functions() - defined_on_the_page() == set()


def test_the_page_defines_nothing_that_the_code_does_not_write():
    known = returned_by_the_functions() | {"known_captions"}  # beside the report on copies
    of_floor = {"floor"}
    of_numbers = {f"val_{what}_{name}" for what in ("mae", "r2") for name in design_grammar([])}
    unknown = {
        name
        for name in names_in_tables() - known - of_floor - of_numbers
        if not any(re.fullmatch(pattern, name) for _, pattern in WRITTEN)
    }
    assert unknown == {"images_per_second"}


def test_a_metric_that_is_missing_would_be_noticed():
    assert not any(re.fullmatch("val_new_metric", name) for name in defined_on_the_page())
    function = ast.parse("def f(x) -> dict[str, float]:\n    y['a'] = 1\n    return {'b': 2, f'{x}_c': 3}").body[0]
    assert isinstance(function, ast.FunctionDef)
    assert set(_keys(function)) == {"a", "b", f"{ANY_NAME}_c"}


def test_psnr_and_ssim_are_those_of_torchmetrics():
    """SSIM is the mean over windows inside of the image; that of torchmetrics is also over its mirrored border."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    torch.manual_seed(0)
    images = torch.rand(2, 3, 32, 40) * 2 - 1
    changed = (images + 0.2 * torch.randn_like(images)).clamp(-1, 1)
    theirs = peak_signal_noise_ratio(changed, images, data_range=2.0, reduction="none", dim=(1, 2, 3))
    assert psnr(changed, images).tolist() == pytest.approx(theirs.tolist(), rel=1e-5)
    measured = structural_similarity_index_measure(changed, images, data_range=2.0, return_full_image=True)
    assert isinstance(measured, tuple)
    inside = measured[1][..., 5:-5, 5:-5].flatten(1).mean(1)
    assert ssim(changed, images).tolist() == pytest.approx(inside.tolist(), rel=1e-4)
