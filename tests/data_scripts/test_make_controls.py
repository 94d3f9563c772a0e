"""Tests of make_controls.py: closed forms of the controls, kept rows and columns of datasets, and bad input.

H W pixels.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from data_scripts import check_dataset, make_controls
from data_scripts.controls import dataset as control_dataset
from data_scripts.controls.kinds import edges, palette, soft_edges
from pipelines.layout_analysis import LayoutAnalysisPipeline
from pipelines.models.layout_encoder import LayoutEncoderModel
from pipelines.tools.cli import UserError
from tests.support.runs import ROOT, launch
from training.core.draws import SampleKey
from training.data.companions import control_of
from training.data.images import DataConfig, ImageDataset, load_split

SCRIPT = ROOT / "data_scripts/make_controls.py"
HEIGHT, WIDTH = 24, 40


def halves(left: tuple[int, int, int], right: tuple[int, int, int], width: int = WIDTH) -> Image.Image:
    """Return an image of two colours side by side."""
    pixels = np.full((HEIGHT, width, 3), left, dtype=np.uint8)
    pixels[:, width // 2 :] = right
    return Image.fromarray(pixels)


def grey(share: float) -> tuple[int, int, int]:
    return (round(255 * share),) * 3


# --- controls of one image


def test_edges_are_lines_where_colour_changes_and_nowhere_else():
    marked = np.asarray(edges(halves(grey(0), grey(1)), sigma=1.0, low=0.03, high=0.1))
    assert marked.shape == (HEIGHT, WIDTH)
    assert set(np.unique(marked)) == {0, 255}
    assert set(np.argwhere(marked[2:-2])[:, 1]) == {WIDTH // 2 - 1, WIDTH // 2}, "on both sides of the step"
    assert (marked[2:-2, WIDTH // 2] == 255).all()
    assert not np.asarray(edges(Image.new("RGB", (WIDTH, HEIGHT), "red"), 1.0, 0.03, 0.1)).any(), (
        "no edges at the borders"
    )


def test_thresholds_are_shares_of_black_to_white():
    """Without a blur, a step of 0.2 has a gradient of 0.2."""
    step = halves(grey(0.4), grey(0.6))
    assert np.asarray(edges(step, 0.0, 0.1, 0.18)).any()
    assert not np.asarray(edges(step, 0.0, 0.1, 0.22)).any()


def test_soft_edges_grow_with_the_root_of_the_contrast():
    strengths = [np.asarray(soft_edges(halves(grey(0), grey(share)), 1.0)).max() for share in (0.0, 0.25, 1.0)]
    assert strengths == pytest.approx([0, 128, 255], abs=1)
    drawn = np.asarray(soft_edges(halves(grey(0), grey(1)), 1.0))
    assert (drawn[:, WIDTH // 2 - 1 : WIDTH // 2 + 1] == 255).all()
    assert not drawn[:, : WIDTH // 4].any()


def test_edges_of_both_kinds_see_colours_of_one_brightness():
    red, green = (200, 0, 0), (0, 102, 0)
    step = halves(red, green)
    assert len(np.unique(np.asarray(step.convert("L")))) == 1
    assert np.asarray(soft_edges(step, 1.0)).max() > 200
    assert (np.asarray(edges(step, 1.0, 0.03, 0.1))[2:-2] > 0).any(1).all()


def test_a_wider_blur_leaves_less_detail():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    counts = [(np.asarray(edges(noise, sigma, 0.03, 0.1)) > 0).sum() for sigma in (1.0, 3.0)]
    assert counts[1] < counts[0]


def test_a_palette_has_the_colour_of_most_of_each_cell():
    pixels = np.zeros((24, 24, 3), dtype=np.uint8)
    pixels[:, :14] = (200, 30, 40)  # three quarters of the middle column of cells (8 to 16)
    drawn = np.asarray(palette(Image.fromarray(pixels), colors=2, cells=3))
    assert (drawn[:, :16] == (200, 30, 40)).all()
    assert (drawn[:, 16:] == 0).all()


@pytest.mark.parametrize(("size", "cells"), [((30, 50), (4, 7)), ((50, 30), (7, 4)), ((3, 3), (3, 3))])
def test_a_palette_has_few_colours_in_square_cells(size: tuple[int, int], cells: tuple[int, int]):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    drawn = np.asarray(palette(Image.fromarray(pixels), colors=5, cells=4))
    assert drawn.shape == pixels.shape
    assert 1 < len(np.unique(drawn.reshape(-1, 3), axis=0)) <= 5
    for axis, count in ((1, cells[0]), (0, cells[1])):
        changes = np.any(np.diff(drawn.astype(int), axis=axis), axis=(1 - axis, 2)).sum()
        assert changes <= count - 1


# --- datasets


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Make an imagefolder of two splits with captions and masks.

    The images have several sizes; one of them is transparent, and one is rotated by its EXIF orientation.
    """
    folder = tmp_path / "images"
    for split, count in (("train", 7), ("validation", 3)):
        (folder / split).mkdir(parents=True)
        lines = []
        for row in range(count):
            image = halves(grey(row / 10), grey(1 - row / 20), width=WIDTH + row)
            if row == 1:
                image.putalpha(Image.linear_gradient("L").resize(image.size))
            exif = Image.Exif()
            exif[0x0112] = 6 if row == 2 else 1
            image.save(folder / split / f"{row}.png", exif=exif)
            upright = image.size[::-1] if row == 2 else image.size
            Image.new("L", upright, row).save(folder / split / f"{row}_mask.png")
            names = {"file_name": f"{row}.png", "mask_file_name": f"{row}_mask.png"}
            lines.append(json.dumps({**names, "text": f"number {row}"}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def make(source: Path, folder: Path, *flags: str) -> Path:
    assert make_controls.main(["--train_data_dir", str(source), "--output_dir", str(folder), *flags]) == 0
    return folder


def opened(folder: Path, split: str = "train"):
    return load_split(DataConfig(dataset_name=str(folder)), split, 0)


def test_all_rows_and_columns_are_kept_and_controls_match_their_images(image_folder, tmp_path, capsys):
    made = make(image_folder, tmp_path / "made", "--kind", "soft_edges")
    assert {path.name for path in made.iterdir()} == {"README.md", "data", "manifest.json", "contact_sheet.png"}
    for split, count in (("train", 7), ("validation", 3)):
        rows = opened(made, split)
        assert len(rows) == count
        assert rows.column_names == ["image", "mask", "text", "conditioning_image"]
        for number, row in enumerate(rows.cast_column("image", datasets.Image(decode=False))):
            assert row["text"] == f"number {number}"
            assert row["image"]["bytes"] == (image_folder / split / f"{number}.png").read_bytes()
            assert row["mask"].getextrema() == (number, number)
    config = DataConfig(dataset_name=str(made), resolution=16)
    data = ImageDataset(opened(made), config, captions=True, control=control_of("conditioning_image", 0))
    batch = data.collate(data.__getitems__([SampleKey(i, 0) for i in range(7)]))
    assert batch["conditioning_pixel_values"].shape == (7, 3, 16, 16)
    assert check_dataset.main(["--dataset_name", str(made)]) == 0, "sizes match, also those of rotated images"
    output = capsys.readouterr().out
    assert f"--dataset_name {made} --conditioning_image_column conditioning_image" in output
    assert str(made / "contact_sheet.png") in output


def test_large_images_are_reduced_before_their_controls_are_drawn(tmp_path):
    (tmp_path / "images").mkdir()
    for name, size in {"large": (400, 300), "tall": (100, 900), "small": (20, 30)}.items():
        halves(grey(0), grey(1)).resize(size).save(tmp_path / f"images/{name}.png")
    flags = ("--train_data_dir", str(tmp_path / "images"), "--kind", "soft_edges", "--resolution", "64")
    assert make_controls.main([*flags, "--output_dir", str(tmp_path / "out")]) == 0
    rows = datasets.load_dataset(str(tmp_path / "out"))["train"]
    assert [row["image"].size for row in rows] == [(85, 64), (20, 30), (64, 576)]
    assert [row["conditioning_image"].size for row in rows] == [(85, 64), (20, 30), (64, 576)]
    expected = soft_edges(halves(grey(0), grey(1)).resize((400, 300)).resize((85, 64), Image.Resampling.LANCZOS), 0.7)
    assert np.array_equal(np.asarray(rows[0]["conditioning_image"]), np.asarray(expected))


def test_transparent_images_are_drawn_on_white(image_folder, tmp_path):
    rows = opened(make(image_folder, tmp_path / "made", "--kind", "palette", "--colors", "8"))
    control = np.asarray(rows[1]["conditioning_image"]).astype(int)
    assert control[0].mean() > 200, "the upper edge is transparent"


def test_several_kinds_are_columns(image_folder, tmp_path):
    made = make(image_folder, tmp_path / "made", "--kind", "[edges, palette]", "--columns", "[lines, colours]")
    row = opened(made)[3]
    assert row["lines"].mode == "L"
    assert row["colours"].mode == "RGB"
    assert row["lines"].size == row["colours"].size == row["image"].size
    expected = edges(row["image"].convert("RGB"), 0.7, 0.03, 0.1)
    assert np.array_equal(np.asarray(row["lines"]), np.asarray(expected))
    card = (made / "README.md").read_text()
    assert "| `lines` | white lines where colour changes" in card
    assert "- colors: 6" in card
    assert str(tmp_path) not in card + (made / "manifest.json").read_text()


def test_layouts_are_predicted_by_the_encoder(image_folder, tmp_path, capsys):
    torch.manual_seed(0)
    reader = LayoutAnalysisPipeline(encoder=LayoutEncoderModel((8, 16), sample_size=16).eval())
    reader.save_pretrained(tmp_path / "reader")
    made = make(image_folder, tmp_path / "made", "--kind", "layout", "--encoder", str(tmp_path / "reader"))
    row = opened(made)[4]
    features = reader(row["image"], overlays=False).features[0]
    for number, name in enumerate(("text_mask", "image_mask")):
        assert np.array_equal(np.asarray(row[name]), features[number] * 255)
    assert "--conditioning_image_column '[text_mask,image_mask]'" in capsys.readouterr().out


def test_rows_go_to_disk_as_they_are_made(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(control_dataset, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr(control_dataset, "ROWS_PER_SHARD", 4)
    made = make(image_folder, tmp_path / "made", "--kind", "edges")
    files = sorted(path.name for path in (made / "data").iterdir())
    assert files == ["train-00000.parquet", "train-00001.parquet", "validation-00000.parquet"]
    assert opened(made)["text"][:] == [f"number {i}" for i in range(7)]
    monkeypatch.setattr(control_dataset, "BYTES_PER_SHARD", 1)
    by_size = make(image_folder, tmp_path / "by_size", "--kind", "edges")
    assert len(list((by_size / "data").glob("train-*"))) >= 4


def test_classes_are_kept(tmp_path):
    """Classes are kept both from folders of classes and from the Parquet files of an earlier run."""
    for name in ("cat", "dog"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for row in range(2):
            halves(grey(0.2), grey(0.9)).save(tmp_path / "classes" / name / f"{row}.png")
    once = make(tmp_path / "classes", tmp_path / "once", "--kind", "edges", "--columns", "[lines]")
    flags = ["--dataset_name", str(once), "--output_dir", str(tmp_path / "twice"), "--kind", "palette"]
    assert make_controls.main(flags) == 0
    rows = opened(tmp_path / "twice")
    assert rows.features["label"].names == ["cat", "dog"]
    assert {"lines", "conditioning_image"} <= set(rows.column_names)


def test_the_sheet_shows_each_image_beside_its_controls(image_folder, tmp_path):
    made = make(image_folder, tmp_path / "made", "--kind", "[edges, palette]")
    with Image.open(made / "contact_sheet.png") as sheet:
        assert sheet.width > 3 * 128
        assert sheet.height > 128


# --- broken images and earlier folders


@pytest.fixture
def broken(image_folder) -> Path:
    file = image_folder / "train/5.png"
    file.write_bytes(file.read_bytes()[:60])
    return image_folder


def test_a_broken_image_is_named_and_nothing_is_left(broken, tmp_path, monkeypatch):
    monkeypatch.setattr(control_dataset, "ROWS_AT_ONCE", 2)
    with pytest.raises(UserError, match="row 5 of the dataset: .*--on_bad_sample skip"):
        make(broken, tmp_path / "made", "--kind", "edges")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".made.lock", "images"]


def test_a_broken_image_is_skipped_if_requested(broken, tmp_path, capsys):
    made = make(broken, tmp_path / "made", "--kind", "edges", "--on_bad_sample", "skip")
    assert "1 rows with broken images were skipped" in capsys.readouterr().out
    assert opened(made)["text"][:] == [f"number {i}" for i in (0, 1, 2, 3, 4, 6)]


def test_earlier_controls_are_set_aside_only_when_asked(image_folder, tmp_path, capsys):
    made = make(image_folder, tmp_path / "made", "--kind", "edges")
    with pytest.raises(UserError, match="already holds controls; .*--overwrite true"):
        make(image_folder, made, "--kind", "palette")
    make(image_folder, made, "--kind", "palette", "--overwrite")
    assert "The earlier controls are now in" in capsys.readouterr().out
    assert (tmp_path / "made_old_1/data").is_dir()
    assert opened(made)[0]["conditioning_image"].mode == "RGB"
    (made / "data/train-00000.parquet").unlink()
    make(image_folder, made, "--kind", "palette")
    assert "lacks the file data/train-00000.parquet, so it is made again" in capsys.readouterr().out
    assert (tmp_path / "made_old_2/README.md").is_file()


# --- bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--kind is missing; give one or more of edges, soft_edges, palette, layout"),
        (["--kind", "edge"], "--kind edge is none of .*; did you mean 'edges'"),
        (["--kind", "[edges, edges]"], "--kind lists a kind twice"),
        (["--kind", "layout"], "--kind layout needs a layout encoder; name one with --encoder RUN"),
        (["--kind", "edges", "--encoder", "x"], "--encoder is x, but --kind has no layout"),
        (["--kind", "layout", "--encoder", "/nowhere/x"], "no pipeline, run or checkpoint at '/nowhere/x'"),
        (["--kind", "edges", "--columns", "[a, b]"], r"give one distinct name for each of: conditioning_image"),
        (["--kind", "edges", "--columns", "[mask]"], "the dataset already has a column 'mask'; .*--columns"),
        (["--kind", "edges", "--sigma", "-1"], "--sigma is -1.0; it must be at least 0"),
        (["--kind", "edges", "--low_threshold", "0.5"], "--low_threshold is 0.5 and --high_threshold is 0.1"),
        (["--kind", "palette", "--colors", "0"], "--colors is 0; it must be between 1 and 256"),
        (["--kind", "edges", "--image_column", "imag"], "no column 'imag'; did you mean 'image'"),
        (
            ["--kind", "edges", "--image_column", "text", "--on_bad_sample", "error"],
            "column 'text' of .* names the file number 0, which is not in the dataset's own folder",
        ),
        (["--kind", "edges", "--dataset_name", "x"], "both dataset_name .* and train_data_dir"),
        (["--kind", "edges", "--train_data_dir", "/nowhere/x"], "'/nowhere/x' does not exist"),
        (["--kind", "edges", "--output_dir", ""], "--output_dir is missing"),
        (["--kind", "edges", "--output_dir", "/proc/x/y"], "--output_dir /proc/x/y cannot be written"),
        (["--kind", "edges", "--kinds", "edges"], "--kinds"),
    ],
)
def test_bad_input(image_folder, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        make(image_folder, tmp_path / "made", *flags)
    assert not (tmp_path / "made").exists()


def test_the_source_itself_is_never_overwritten(image_folder):
    with pytest.raises(UserError, match="is not empty and holds no controls made by"):
        make(image_folder, image_folder, "--kind", "edges", "--overwrite")


def test_edges_without_scikit_image_and_palettes_without_it(image_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(UserError, match=r"--kind edges needs scikit-image, .*: pip install -e '\.\[controls\]'"):
        make(image_folder, tmp_path / "made", "--kind", "[palette, edges]")
    make(image_folder, tmp_path / "made", "--kind", "palette")


def test_as_a_program_bad_input_is_one_line_and_status_2(tmp_path):
    done = launch(
        SCRIPT, "--train_data_dir", str(tmp_path / "none"), "--kind", "edges", "--output_dir", "x", cwd=tmp_path
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: dataset ")
