"""Near-duplicates: copies of real images are found, different emoji and posters are not, and the report names them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image, ImageOps

from data_scripts import check_dataset
from data_scripts.duplicates.groups import Group, groups_of
from data_scripts.duplicates.prints import Place, Prints, print_of, verified_print
from data_scripts.duplicates.search import BLOCK, Pair, near_duplicates
from data_scripts.posters.records import PosterOptions, make_row
from pipelines.tools.cli import UserError
from training.data.transforms import BrokenImage

DISTANCE = check_dataset.CheckConfig().near_duplicate_distance


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def cut(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    """Cut shares of the sides off, and keep the size."""
    width, height = image.size
    box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
    return image.resize(image.size, Image.Resampling.BICUBIC, box=box)


COPIES: dict[str, tuple[Callable[[Image.Image], Image.Image], float]] = {
    # How an image is copied, and the share of such copies that must be found.
    "half the size": (lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS), 1),
    "double the size, JPEG": (lambda image: jpeg(image.resize((2 * image.width, 2 * image.height)), 60), 1),
    "JPEG of quality 50": (lambda image: jpeg(image, 50), 0.97),
    "mirrored": (lambda image: jpeg(ImageOps.mirror(image), 80), 1),
    "all sides cut by 2 %": (lambda image: cut(image, 0.02, 0.02, 0.02, 0.02), 0.95),
    "all sides cut by 4 %, JPEG": (lambda image: jpeg(cut(image, 0.04, 0.04, 0.04, 0.04), 80), 0.85),
    "one side cut by 5 %": (lambda image: cut(image, 0.05, 0, 0, 0), 0.8),
    "mirrored, cut and smaller": (
        lambda image: cut(ImageOps.mirror(image), 0.03, 0.03, 0.03, 0.03).resize((48, 48), Image.Resampling.LANCZOS),
        0.7,
    ),
}


def posters(complexity: str, number: int) -> list[Image.Image]:
    options = PosterOptions(11, 64, complexity)
    rows = [make_row(options, index) for index in range(number)]
    return [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]


@pytest.fixture(scope="module", params=["emoji", "plain", "rich"])
def images(request: pytest.FixtureRequest) -> list[Image.Image]:
    """64 different images."""
    if request.param != "emoji":
        return posters(request.param, 64)
    files = sorted((request.getfixturevalue("shared_dir") / "data" / "noto_emoji" / "images").iterdir())
    return [Image.open(file).convert("RGB") for file in files[::34][:64]]


def pairs_among(images: list[Image.Image]) -> set[tuple[int, int]]:
    prints = Prints()
    for row, image in enumerate(images):
        prints.add(Place("train", row, "train"), str(row).encode(), print_of(image))
    return {pair[:2] for pair in near_duplicates(prints, DISTANCE)}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_found_and_different_images_are_not(images, kind):
    copy, least = COPIES[kind]
    number = len(images)
    found = pairs_among([*images, *(copy(image) for image in images)])
    of_copies = {(row, row + number) for row in range(number)}
    assert len(found & of_copies) >= least * number
    assert found <= of_copies


def test_posters_that_differ_in_a_word_or_a_shape_are_different():
    pages = []
    for shape, bar in ((0, 0), (0, 1), (1, 0), (1, 1)):
        page = np.full((64, 64, 3), (250, 200, 40), np.uint8)
        page[10:26, 40:56] = (200, 30, 30) if shape else (30, 30, 200)
        page[44:50, 6 : 40 if bar else 22] = 20
        pages.append(Image.fromarray(page))
    assert pairs_among(pages) == set()


def test_flat_images_of_different_colours_are_different():
    """All bits of their hashes are equal, so only the thumbnails tell them apart."""
    colours = [Image.new("RGB", (32, 32), (8 * value, 255 - 8 * value, 128)) for value in range(0, 32, 4)]
    assert pairs_among(colours) == set()
    assert pairs_among([*colours, jpeg(colours[3], 70)]) == {(3, len(colours))}


def test_more_images_than_are_compared_at_once():
    """Pairs within a block and between two blocks; random images, of which two are repeated."""
    generator = np.random.default_rng(0)
    prints = Prints()
    for row in range(BLOCK + 40):
        noise = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        prints.add(Place("train", row, "train"), str(row).encode(), print_of(Image.fromarray(noise).resize((32, 32))))
    for copy, original in ((BLOCK + 7, 3), (BLOCK + 30, BLOCK + 2), (90, 20)):
        prints.hashes[copy], prints.thumbnails[copy] = prints.hashes[original], prints.thumbnails[original]
    assert {pair[:2] for pair in near_duplicates(prints, DISTANCE)} == {
        (3, BLOCK + 7),
        (BLOCK + 2, BLOCK + 30),
        (20, 90),
    }


def test_groups_are_transitive_and_those_between_parts_come_first():
    prints = Prints()
    some = print_of(Image.new("RGB", (32, 32)))
    for row in range(6):
        prints.add(Place("train", row, "train"), f"{row}".encode(), some)
    prints.add(Place("validation", 0, "validation"), b"6", some)
    prints.add(Place("train", 9, "train"), b"5", some)  # the bytes of row 5
    assert len(prints.places) == 7
    groups = groups_of(prints, [Pair(0, 1, 0.01), Pair(1, 3, 0.02), Pair(2, 6, 0.03)])
    places = [[(place.split, place.row) for place in group.places] for group in groups]
    assert places == [
        [("train", 2), ("validation", 0)],
        [("train", 0), ("train", 1), ("train", 3)],
        [("train", 5), ("train", 9)],
    ]
    assert [group.difference for group in groups] == [0.03, 0.01, 0.0]
    assert isinstance(groups[0], Group)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """12 posters and a JPEG copy, a mirrored copy and a copy of the bytes of some of them."""
    folder = tmp_path_factory.mktemp("near") / "data"
    folder.mkdir()
    pages = posters("rich", 12)
    for row, page in enumerate(pages):
        page.save(folder / f"{row:02d}.png")
    jpeg(pages[3], 70).save(folder / "copy_of_03.jpg", quality=70)
    ImageOps.mirror(pages[5]).resize((48, 48)).save(folder / "mirror_of_05.png")
    (folder / "same_as_07.png").write_bytes((folder / "07.png").read_bytes())
    return folder


def check(folder: Path, *flags: str) -> int | None:
    return check_dataset.main(["--train_data_dir", str(folder), *flags])


def test_the_report_names_the_groups_and_is_not_an_error(dataset, tmp_path, capsys):
    assert check(dataset, "--validation_fraction", "0", "--near_duplicates_dir", str(tmp_path / "out")) == 0
    output = capsys.readouterr().out
    assert "6 images are duplicates or near-duplicates" in output
    assert "in 3 groups" in output
    assert "12 of 15 images remain" in output
    assert "Repeated images are the first that a model reproduces" in output
    for pair in (("03.png", "copy_of_03.jpg"), ("05.png", "mirror_of_05.png"), ("07.png", "same_as_07.png")):
        assert any(all(f"({name})" in line for name in pair) for line in output.splitlines())
    assert "in more than one part" not in output
    assert "No problems" in output
    groups = json.loads((tmp_path / "out" / "near_duplicates.json").read_text())
    assert sorted(place["file"] for group in groups for place in group)[0] == "03.png"
    assert len(groups) == 3
    sheet = Image.open(tmp_path / "out" / "near_duplicates.png")
    assert sheet.width > 4 * 128  # two groups of two images; files with the same bytes are not shown
    assert sheet.height < 2 * 128


def test_zero_disables_the_search(dataset, tmp_path, capsys):
    assert check(dataset, "--near_duplicate_distance", "0", "--near_duplicates_dir", str(tmp_path / "out")) == 0
    output = capsys.readouterr().out
    assert "near-duplicates" not in output
    assert "1 images occur more than once" in output
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="near_duplicate_distance"):
        check(dataset, "--near_duplicate_distance", "-1")


def test_held_out_rows_that_are_also_trained_on_are_named_first(dataset, capsys):
    """Without a validation split, half of the rows are held out; some group has images in both halves."""
    for seed in range(10):
        assert check(dataset, "--validation_fraction", "0.5", "--seed", str(seed)) == 0
        output = capsys.readouterr().out
        if "in more than one part" in output:
            break
    assert "(train, the held-out rows of train)" in output or "(the held-out rows of train, train)" in output
    first = output.split("Remove these first")[1].splitlines()[1]
    assert first.count(", held out") == 1


def test_copies_in_another_split_are_named_first(tmp_path, capsys):
    pages = posters("plain", 8)
    for split, part in (("train", [*pages[:6], jpeg(pages[0], 60)]), ("validation", [*pages[6:], jpeg(pages[4], 60)])):
        columns = {"image": part, "text": ["a poster"] * len(part)}
        features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")
    assert check_dataset.main(["--dataset_name", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "1 of these groups are in more than one part of the data (train, validation)" in output
    listed = [line.strip(" -") for line in output.splitlines() if line.startswith("  - ")]
    assert listed == ["train row 4 = validation row 2", "train row 0 = train row 6"]


def test_a_damaged_image_is_a_problem_and_has_no_print(dataset, tmp_path, capsys):
    for file in dataset.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "copy_of_03.jpg").write_bytes((dataset / "copy_of_03.jpg").read_bytes()[:400])
    assert check(tmp_path) == 2
    output = capsys.readouterr().out
    assert "copy_of_03.jpg" in output.split("1 problems:")[1]
    assert "4 images are duplicates or near-duplicates" in output
    with pytest.raises(BrokenImage):
        verified_print({"bytes": b"broken", "path": None})
