"""Make the screenshots of docs/studio.md: the studio with trained models, in a real browser (Debian: chromium).

    python -m tests.support.studio_screenshots --model runs/posters/decoder_plain_64 runs/image_caption/emoji_64

Each kind of tab is shown once, with the first model that has it. --images names a folder with images for the tabs that
take one: image_to_image.png, inpainting.png, caption.png and analyse.png; without them, the examples of the studio
serve. Files of tabs that no model has are left as they are.
"""

from __future__ import annotations

import argparse
import io
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops
from playwright.sync_api import expect

from pipelines.tools.cli import Options, UserError, entry_point
from tests.support.browser import DOWNLOADS, SECONDS, Line, Visitor, chromium, studio

WIDTH = 900
"""Width of a screenshot in pixels; the page is wider"""
MOST_BYTES = 150_000
MARGIN = 20
SETTLED = """() => {
  const visible = (e) => e.offsetParent !== null;
  const shown = (what) => [...document.querySelectorAll(what)].filter(visible);
  return document.fonts.status === "loaded"
    && shown(".generating, .pending, .progress-text, .eta-bar, .toast-body").length === 0
    && shown("img").every((image) => image.complete && image.naturalWidth > 0);
}"""
"""Whether nothing is on its way any more, and no message covers the page"""
BAND: list[Line] = [((0.2, 0.76 + 0.03 * row), (0.8, 0.76 + 0.03 * row)) for row in range(3)]
BLOCK: list[Line] = [((0.35, 0.36 + 0.03 * row), (0.65, 0.36 + 0.03 * row)) for row in range(7)]


@dataclass
class Scene:
    """What is done in a tab before its screenshot is made."""

    visitor: Visitor
    options: argparse.Namespace

    def image(self, scene: str) -> Path | None:
        """Return the file of --images for a scene, if there is one."""
        file = Path(self.options.images or "") / f"{scene}.png"
        return file if self.options.images and file.is_file() else None

    def choose_image(self, scene: str, title: str, example: str) -> None:
        """Put the image of a scene, or an example, into the component with this title."""
        file = self.image(scene)
        if file is None:
            self.visitor.use_example(example, title)
        else:
            self.visitor.upload_image(title, file)

    def write_prompt(self) -> None:
        """Write --prompt, if it is given and the model takes one."""
        if self.options.prompt and self.visitor.control("textbox", "Prompt").count():
            self.visitor.write("Prompt", self.options.prompt)

    def generate(self) -> None:
        self.visitor.press("Generate")
        self.visitor.wait_for_status("images in")

    def text(self) -> None:
        self.write_prompt()
        self.generate()

    def image_to_image(self) -> None:
        self.choose_image("image_to_image", "Image to change", "House")
        self.write_prompt()
        self.generate()

    def inpainting(self) -> None:
        file = self.image("inpainting")
        if file is None:
            self.visitor.use_example_on_canvas("Circle")
        else:
            self.visitor.upload_to_canvas("Image to fill", file)
        self.visitor.paint("Paint the part to fill", *BLOCK)
        self.generate()

    def control(self) -> None:
        canvases = self.visitor.page.locator("[role=group][aria-label^='Draw: ']:visible")
        canvases.first.wait_for()
        names = [str(name) for name in canvases.evaluate_all("all => all.map((e) => e.getAttribute('aria-label'))")]
        for name, lines in zip(dict.fromkeys(names), (BAND, BLOCK)):
            self.visitor.paint(name, *lines)
        self.write_prompt()
        self.generate()

    def brief(self) -> None:
        self.visitor.press_and_wait_for_settings("swiss")
        self.generate()

    def caption(self) -> None:
        self.choose_image("caption", "Image to caption", "Circle")
        self.visitor.set_slider("Beams", 4)
        self.visitor.press("Caption")
        result = self.visitor.page.get_by_role("textbox", name="Caption", exact=True)
        expect(result).not_to_have_value("", timeout=1000 * SECONDS)

    def draw(self) -> None:
        if self.options.caption:
            self.visitor.write("Caption to draw", self.options.caption)
        else:
            self.visitor.page.locator("button.gallery-item:visible").first.click()
        self.visitor.press("Draw")
        self.visitor.wait_for_status("images")

    def invent(self) -> None:
        self.visitor.press("Invent")
        self.visitor.group(DOWNLOADS).get_by_role("link").first.wait_for()

    def analyse(self) -> None:
        self.choose_image("analyse", "Poster to analyse", "Poster")
        self.visitor.press("Analyse")
        self.visitor.group("Report").locator("img").first.wait_for()

    def runs(self) -> None:
        self.visitor.wait_for_status("step: ")
        if self.options.compare:
            for name, label in zip(self.options.compare, ("Run", "Compare with")):
                self.visitor.choose(label, name)
                self.visitor.wait_for_status(f"{re.escape(name)}: ")
                # Samples are shown last: their label names the run.
                label = re.compile(f"{re.escape(name)}: (epoch|step)")
                self.visitor.page.locator("[data-testid=block-label]").filter(has_text=label).first.wait_for()


SCENES: dict[str, tuple[str, Callable[[Scene], None]]] = {
    "Text to image": ("text", Scene.text),
    "Class to image": ("class", Scene.generate),
    "Generate": ("unconditional", Scene.generate),
    "Image to image": ("image_to_image", Scene.image_to_image),
    "Inpainting": ("inpainting", Scene.inpainting),
    "Control": ("control", Scene.control),
    "Brief to poster": ("brief", Scene.brief),
    "Caption": ("caption", Scene.caption),
    "Draw": ("draw", Scene.draw),
    "Invent": ("invent", Scene.invent),
    "Analyse": ("analyse", Scene.analyse),
    "Training runs": ("runs", Scene.runs),
}
"""What is shown of each tab, by its title, and the name of its screenshot"""


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    output = Path(options.output).expanduser()
    output.mkdir(parents=True, exist_ok=True)
    flags = ["--model", *(str(Path(model).expanduser().resolve()) for model in options.model)]
    flags += ["--runs", str(Path(options.runs).expanduser().resolve())] if options.runs else []
    with tempfile.TemporaryDirectory() as folder, studio(*flags, cwd=Path(folder)) as address, chromium() as browser:
        for path, title in tabs_to_show(browser, address, options.only).items():
            visitor = Visitor(browser, address, scale=1)
            visitor.open(*path)
            name, act = SCENES[title]
            act(Scene(visitor, options))
            image = screenshot(visitor)
            visitor.close()
            file = output / f"studio_{name}.png"
            file.write_bytes(packed(image))
            print(f"{file}: {image.width} x {image.height} pixels, {file.stat().st_size / 1000:.0f} kB", flush=True)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Raises UserError."""
    names = [name for name, _ in SCENES.values()]
    parser = Options(__doc__)
    add = parser.add_argument
    add("--model", nargs="+", required=True, help="Pipeline folders, runs or checkpoints, in the order of their tabs")
    add("--runs", help="Folder of training runs, for the tab of training runs")
    add("--compare", nargs=2, metavar="RUN", help="Names of two runs that are compared (default: only one is shown)")
    add("--images", help="Folder with images for the tabs that take one (default: the examples of the studio)")
    add("--prompt", help="Prompt of the tabs of latent diffusion models (default: none)")
    add("--caption", help="Caption that is drawn (default: the first example)")
    add("--only", nargs="+", choices=names, default=names, help="Names of the screenshots to make (default: all)")
    add("--output", default="docs/images", help="Folder of the screenshots (default: docs/images)")
    return parser.parse(argv)


def tabs_to_show(browser: Any, address: str, only: Sequence[str]) -> dict[tuple[str, ...], str]:
    """Return the first tab with each title in the page, as the tabs to click on. Raises UserError if there is none."""
    visitor = Visitor(browser, address)
    tabs = visitor.page.locator("[role=tab]:visible")
    tabs.first.wait_for()
    models = [name for name in tabs.all_inner_texts() if name not in SCENES or name == "Training runs"]
    found: dict[str, tuple[str, ...]] = {}
    for model in models or [""]:
        if model:
            visitor.open(model)
        titles = [model] if model in SCENES else [name for name in tabs.all_inner_texts() if name not in models]
        for title in titles:
            if title in SCENES and SCENES[title][0] in only:
                found.setdefault(title, tuple(name for name in dict.fromkeys((model, title)) if name))
    visitor.close()
    if not found:
        raise UserError("none of the models has such a tab; add a model that has it, or leave out --only")
    return {path: title for title, path in found.items()}


def screenshot(visitor: Visitor) -> Image.Image:
    """Return the whole page as it looks when everything has arrived, WIDTH pixels wide, without empty space below."""
    page = visitor.page
    page.evaluate("() => { document.activeElement.blur(); window.scrollTo(0, 0); }")
    page.mouse.move(0, 0)
    page.wait_for_function(SETTLED)
    page.wait_for_timeout(1000)  # canvases are drawn again after the page has been scrolled
    page.wait_for_function(SETTLED)
    image = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    used = ImageChops.difference(image, Image.new("RGB", image.size, image.getpixel((0, image.height - 1)))).getbbox()
    height = min(image.height, (used[3] if used else image.height) + MARGIN)
    image = image.crop((0, 0, image.width, height))
    return image.resize((WIDTH, round(height * WIDTH / image.width)), Image.Resampling.LANCZOS)


def packed(image: Image.Image) -> bytes:
    """Return an image as a PNG file with as many colours, at most 256, as fit into MOST_BYTES."""
    for colors in (256, 128, 64, 32):
        buffer = io.BytesIO()
        image.quantize(colors, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
        if buffer.tell() <= MOST_BYTES:
            break
    return buffer.getvalue()


if __name__ == "__main__":
    entry_point(main)
