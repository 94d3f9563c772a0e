"""Files that a browser sends to the studio: requests that are written by hand get messages, and nothing is decoded that
is larger than allowed."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from gradio.components.image_editor import AcceptBlobs
from gradio.context import LocalContext
from gradio.exceptions import InvalidPathError
from PIL import Image

from pipelines.studio.bounds import MOST_CANVAS_SIDE, MOST_LAYERS
from pipelines.studio.components import CANVAS_SIDE, canvas, picture


@pytest.fixture
def uploads(tmp_path, monkeypatch) -> Path:
    """The folder in which the studio keeps what was uploaded."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    folder = tmp_path / "uploads" / "sum"
    folder.mkdir(parents=True)
    return folder


def received(make: Callable[[], Any], payload: Any) -> Any:
    """Return what a function of an open page gets for the JSON of a request."""
    with gr.Blocks() as page:
        gr.Button().click(lambda value: None, make(), None)
    (function,) = page.fns.values()

    async def handled() -> Any:
        LocalContext.blocks.set(page)
        page.has_launched = True  # Gradio checks the paths of requests only then
        return (await page.preprocess_data(function, [payload], None))[0]

    return asyncio.run(handled())


def file_of(path: Path | str) -> dict[str, Any]:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


def editor(background: Path | str | None, *layers: Path | str, composite: Path | str | None = None) -> dict[str, Any]:
    return {
        "background": background and file_of(background),
        "layers": [file_of(layer) for layer in layers],
        "composite": composite and file_of(composite),
    }


def saved(path: Path, size: tuple[int, int], mode: str = "1", **options: Any) -> Path:
    Image.new(mode, size).save(path, **options)
    return path


def a_canvas() -> gr.ImageEditor:
    return canvas("Draw", ["#ffffff"])


def a_file() -> gr.File:
    return gr.File(label="PNG file")


def test_what_the_page_sends_arrives_as_it_was_drawn(uploads):
    background = saved(uploads / "background.png", (CANVAS_SIDE, 256), "RGB")
    layer = Image.new("RGBA", (CANVAS_SIDE, 256))
    layer.paste((255, 0, 0, 128), (0, 0, 10, 10))
    layer.save(uploads / "layer.png")
    value = received(a_canvas, editor(background, uploads / "layer.png", composite=background))
    assert value["layers"][0].tobytes() == layer.tobytes()
    assert value["background"].convert("RGB").tobytes() == Image.new("RGB", (CANVAS_SIDE, 256)).tobytes()
    assert received(a_canvas, editor(None)) == {"background": None, "layers": [], "composite": None}
    assert received(a_canvas, None) is None


@pytest.mark.parametrize("place", ["background", "layer"])
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: saved(path, (13_000, 13_000)), "far too many pixels"),
        (lambda path: saved(path, (6_000, 6_000)), f"6,000 × 6,000 pixels, and at most {MOST_CANVAS_SIDE:,} per side"),
        (lambda path: saved(path, (1, MOST_CANVAS_SIDE + 1)), f"at most {MOST_CANVAS_SIDE:,} per side"),
        (lambda path: path.write_text("a text\n" * 100), "cannot be read as an image"),
        (lambda path: path.write_bytes(png()[:2000]), "cannot be read as an image"),
        (lambda path: saved(path, (8, 8), "RGB", format="EPS"), "cannot be read as an image"),
    ],
    ids=["bomb", "large", "narrow", "text", "cut", "eps"],
)
def test_canvases_have_limits_and_messages_without_paths(place, write, message, uploads):
    file = uploads / "image.png"
    write(file)
    payload = editor(file) if place == "background" else editor(None, file)
    with pytest.raises(gr.Error) as error:
        received(a_canvas, payload)
    assert message in error.value.message
    assert str(uploads.parent) not in error.value.message


def test_a_canvas_has_few_layers_and_its_composite_is_not_opened(uploads):
    layer = saved(uploads / "layer.png", (8, 8), "RGBA")
    assert len(received(a_canvas, editor(None, *[layer] * MOST_LAYERS))["layers"]) == MOST_LAYERS
    with pytest.raises(gr.Error, match=f"at most {MOST_LAYERS} layers"):
        received(a_canvas, editor(None, *[layer] * (MOST_LAYERS + 1)))
    bomb = saved(uploads / "bomb.png", (13_000, 13_000))
    assert received(a_canvas, editor(None, layer, composite=bomb))["composite"] is None


def test_a_canvas_keeps_nothing_that_is_sent_before_it_is_used():
    """Gradio has a second way for the parts of a drawing, with any number of layers of any size, in memory."""
    with gr.Blocks():
        component = a_canvas()
    data = {"type": "layer", "index": str(10**12), "id": "x", "file": b""}
    component.accept_blobs(AcceptBlobs.model_construct(data=data, files=[("a", png())]))
    assert component.blob_storage == {}
    assert received(a_canvas, {**editor(None), "id": "x"})["layers"] == []


@pytest.mark.parametrize(
    ("make", "payload"),
    [
        (lambda: picture("Image"), file_of),
        (a_file, file_of),
        (a_canvas, editor),
        (a_canvas, lambda path: editor(None, path)),
    ],
    ids=["image", "file", "background", "layer"],
)
def test_no_component_takes_images_that_are_too_large_or_files_from_elsewhere(make, payload, uploads, tmp_path):
    with pytest.raises(gr.Error, match="too many pixels"):
        received(make, payload(saved(uploads / "bomb.png", (20_000, 20_000))))
    with pytest.raises(gr.Error, match="40 million are allowed|per side are allowed"):
        received(make, payload(saved(uploads / "large.png", (8_000, 6_000))))
    with pytest.raises(gr.Error, match="is not fetched; upload the file"):
        received(make, payload("http://192.0.2.1/image.png"))
    other = saved(tmp_path / "private.png", (8, 8))
    with pytest.raises(InvalidPathError, match="was not uploaded by a user"):
        received(make, payload(other))
    received(make, payload(saved(uploads / "small.png", (8, 8))))


def png() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((100, 100), 90).save(buffer, "PNG")
    return buffer.getvalue()
