"""Files of the commands: every kind of unusable file raises a UserError that names it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines.tools.cli import UserError
from pipelines.tools.files import check_image_header, check_output, check_output_folder, read_image


def noise_image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def unusable(folder: Path, kind: str) -> Path:
    path = folder / "file.png"
    if kind == "a folder":
        path.mkdir()
    elif kind == "not an image":
        path.write_text("words")
    elif kind == "empty":
        path.touch()
    elif kind == "cut off":
        noise_image().save(path)
        path.write_bytes(path.read_bytes()[:500])
    return path


@pytest.mark.parametrize("kind", ["missing", "a folder", "not an image", "empty", "cut off"])
def test_an_unusable_image_is_named(tmp_path, kind):
    path = unusable(tmp_path, kind)
    with pytest.raises(UserError, match=r"^.*file.png cannot be read as an image \(.+\); choose another file$"):
        read_image(path)
    with pytest.raises(UserError, match=r"^--control_image x cannot be read as an image"):
        read_image(path, "--control_image x")
    if kind != "cut off":  # its header is intact
        with pytest.raises(UserError, match=r"file.png cannot be read as an image"):
            check_image_header(path)


def test_a_decompression_bomb_is_named(tmp_path, monkeypatch):
    noise_image().save(tmp_path / "file.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size < 100_000
    for read in (check_image_header, read_image):
        with pytest.raises(UserError, match=r"large.png cannot .*too many pixels.*89 million.*HALFTONE_MAX_IMAGE_PIX"):
            read(tmp_path / "large.png")
    monkeypatch.setenv("HALFTONE_MAX_IMAGE_PIXELS", "500")
    with pytest.raises(UserError, match=r"\(it has 30×20 = 0.0006 million pixels, and the limit is 0.0005 million"):
        check_image_header(tmp_path / "file.png")
    monkeypatch.setenv("HALFTONE_MAX_IMAGE_PIXELS", "many")
    with pytest.raises(UserError, match="HALFTONE_MAX_IMAGE_PIXELS is 'many'"):
        check_image_header(tmp_path / "file.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_an_image_does_not_need_its_file_and_keeps_its_orientation(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"turned.{suffix}"
    noise_image().save(path, exif=exif)
    image = read_image(path)
    path.unlink()
    assert ImageOps.exif_transpose(image).convert("RGB").size == (20, 30)


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "new").mkdir()
    check_output(tmp_path / "new" / "folder" / "grid.png")
    check_output_folder(tmp_path / "new" / "folder" / "images")
    assert not any((tmp_path / "new").iterdir()), "a check leaves no trace"
    (tmp_path / "file").write_text("kept")
    check_output(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"
    with pytest.raises(UserError, match=r"--output .*file cannot be written \(.+\); choose another folder"):
        check_output_folder(tmp_path / "file")
    for path in (tmp_path / "file" / "grid.png", tmp_path / "new"):
        with pytest.raises(UserError, match=r"--output .* cannot be written \(.+\); choose another file"):
            check_output(path)
