"""The studio as a person uses it: `pipelines/demo.py` in a process of its own, and a real browser without a screen.

The browser is Chromium of the system (Debian: `apt-get install chromium`), driven by Playwright.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image
from playwright.sync_api import TimeoutError, expect, sync_playwright

from pipelines.tools.cli import UserError
from tests.support.runs import ROOT, environment

SECONDS = 240
"""How long a test waits for something to appear: the machine may be busy."""
DOWNLOADS = "Download: PNG files with all settings"
# Without a GPU, only the canvases are drawn by SwiftShader, and the page by Chromium's own code, which is much faster.
FLAGS = (
    "--no-sandbox", "--disable-dev-shm-usage", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
    "--disable-gpu-compositing", "--disable-gpu-rasterization",
)  # fmt: skip
SCREEN = {"width": 1300, "height": 700}
# Canvases draw themselves 60 times per second, which takes more than a core without a GPU. Five times are enough.
FEW_FRAMES = """
window.requestAnimationFrame = (draw) => setTimeout(() => draw(performance.now()), 200);
window.cancelAnimationFrame = (number) => clearTimeout(number);
"""


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def find_chromium() -> str:
    """Return the path of Chromium. Raises UserError if it is not installed."""
    if CHROMIUM is None:
        raise UserError("Chromium is not installed; on Debian: apt-get install chromium")
    return CHROMIUM


class Opened(NamedTuple):
    """A studio that is open."""

    address: str
    process: subprocess.Popen[str]


@contextmanager
def opened(*flags: str, cwd: Path, program: Sequence[str] = (), **variables: str) -> Iterator[Opened]:
    """Context manager that starts the studio on a free port; it is stopped by the signal of Ctrl-C.

    Args:
        program: the command in the place of `python pipelines/demo.py`, which then does not see the checkout.
        variables: further environment variables.
    """
    command = [*(program or (sys.executable, str(ROOT / "pipelines/demo.py"))), *flags, "--port", "0"]
    paths = {"PYTHONPATH": str(ROOT)} if not program else {"PYTHONPATH": "", "PYTHONSAFEPATH": ""}
    with (cwd / "studio.log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=cwd, env=environment(**paths, **variables), stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            assert process.stdout is not None
            line = next((one for one in process.stdout if "is open at" in one), "")
            assert line, f"the studio ended with {process.wait(10)}: {_tail(log)}"
            yield Opened(re.findall(r"http://\S+", line)[0], process)
            assert process.poll() is None, f"the studio ended: {_tail(log)}"
        finally:
            process.terminate()
            process.wait(60)


@contextmanager
def studio(*flags: str, cwd: Path, program: Sequence[str] = ()) -> Iterator[str]:
    """Context manager that starts the studio and gives its address; see `opened`."""
    with opened(*flags, cwd=cwd, program=program) as open_studio:
        yield open_studio.address


@contextmanager
def chromium() -> Iterator[Any]:
    """Context manager that starts the browser."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_chromium(), args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


def _tail(log: Any) -> str:
    log.seek(0)
    return log.read()[-3000:]


Line = tuple[tuple[float, float], tuple[float, float]]
"""From and to, each as shares of the width and the height of a canvas"""


class Visitor:
    """A person with a browser window.

    Args:
        scale: pixels of the screen for each pixel of the page. Half of them are enough for a test, and the canvases are
            drawn in half of the time.
    """

    def __init__(self, browser: Any, address: str, *, scale: float = 0.5):
        self.page = browser.new_context(
            viewport=SCREEN, device_scale_factor=scale, reduced_motion="reduce", accept_downloads=True
        ).new_page()
        self.page.add_init_script(FEW_FRAMES)
        self.page.set_default_timeout(SECONDS * 1000)
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.fetched: set[str] = set()
        self.page.on("requestfinished", lambda request: self.fetched.add(request.url))
        self.page.goto(address)
        self.page.get_by_role("heading", name="Halftone studio").wait_for()

    def open(self, *tabs: str) -> None:
        """Click on tabs, from the outer one to the inner one."""
        for name in tabs:
            self.page.get_by_role("tab", name=name, exact=True).click()

    def control(self, role: str, name: str) -> Any:
        """Return the control with this label, or with a label that begins with it."""
        return self.page.get_by_role(role, name=re.compile(rf"^{re.escape(name)}")).first

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).first.click()

    def write(self, name: str, text: str) -> None:
        field = self.control("textbox", name)
        self._set(name, lambda: field.fill(text), field.input_value, text)

    def set_number(self, name: str, value: float) -> None:
        field = self.control("spinbutton", name)
        self._set(name, lambda: self._type(field, value), lambda: float(field.input_value()), value)

    def set_slider(self, name: str, value: float) -> None:
        """Write a value beside a slider."""
        field, slider = (
            self.control("spinbutton", f"number input for {name}"),
            self.control("slider", f"range slider for {name}"),
        )
        self._set(name, lambda: self._type(field, value), lambda: float(slider.input_value()), value)

    def _type(self, field: Any, value: float) -> None:
        field.fill(str(value))
        field.press("Tab")

    def _set(self, name: str, act: Callable[[], None], read: Callable[[], Any], value: Any) -> None:
        """Set a control until it keeps its value: a page that has just appeared or changed may take it back.

        It does so in the next frame, which comes later here than for a person (FEW_FRAMES).
        """
        deadline = time.monotonic() + SECONDS
        while True:
            act()
            self.page.wait_for_timeout(500)  # of two or three frames
            if read() == value:
                return
            assert time.monotonic() < deadline, f"'{name}' has the value {read()!r}, not {value!r}"

    def unfold(self, name: str) -> None:
        """Open the part of a tab whose title begins with this name."""
        self.page.get_by_role("button", name=re.compile(f"^{re.escape(name)}")).first.click()

    def field(self, name: str) -> Any:
        """Return the visible control with exactly this label."""
        return self.page.get_by_label(name, exact=True).locator("visible=true").first

    def choose(self, name: str, choice: str) -> None:
        """Choose an entry of a list."""
        self.field(name).click()
        self.page.get_by_role("option", name=choice, exact=True).first.click()

    def press_and_wait_for_settings(self, name: str) -> None:
        """Press a button that changes the values of controls, and wait until they have changed."""
        values = "[...document.querySelectorAll('input, textarea')].map((control) => control.value).join()"
        before = self.page.evaluate(values)
        self.press(name)
        self.page.wait_for_function(f"(before) => {values} !== before", arg=before)

    def group(self, name: str) -> Any:
        return self.page.get_by_role("group", name=name, exact=True).first

    def upload(self, name: str, file: Path) -> None:
        """Choose a file for an image or a list of files, and wait until the studio has it."""
        with self.page.expect_response(lambda response: "/upload?" in response.url):
            self.group(name).locator("input[type=file]").first.set_input_files(file)

    def upload_image(self, name: str, file: Path) -> None:
        """Choose a file for an image, and wait until the page shows it, or tries to."""
        self.upload(name, file)
        self.group(name).locator("img").first.wait_for(state="attached")

    def upload_file(self, name: str, file: Path) -> None:
        """Choose a file for a list of files, and wait until the list has it."""
        self.upload(name, file)
        self.group(name).get_by_text(file.stem).first.wait_for()

    def upload_to_canvas(self, name: str, file: Path) -> None:
        """Choose a file for an image that is copied to a canvas, and wait until the canvas has fetched the copy."""
        with self.page.expect_event("requestfinished", self._is_new_copy()):
            self.upload_image(name, file)

    def use_example(self, name: str, title: str) -> None:
        """Press the button of an example for the image with this title, and wait until the page shows it."""
        self.press(name)
        self.group(title).locator("img").first.wait_for()

    def use_example_on_canvas(self, name: str) -> None:
        """Press the button of an example that is copied to a canvas, and wait until the canvas has fetched the copy."""
        with self.page.expect_event("requestfinished", self._is_new_copy()):
            self.press(name)

    def _is_new_copy(self) -> Callable[[Any], bool]:
        known = set(self.fetched)  # a canvas without strokes fetches its old content again for each generation
        return lambda request: request.url.endswith("/image.png") and request.url not in known

    def paint(self, name: str, *lines: Line) -> None:
        """Draw straight lines on a canvas with the brush; without `lines`, a horizontal one through the middle."""
        group = self.group(name)
        group.scroll_into_view_if_needed()
        group.get_by_role("button", name="Brush", exact=True).click()
        box = group.locator("canvas").first.bounding_box()
        for line in lines or [((0.4, 0.5), (0.6, 0.5))]:
            (x, y), (end_x, end_y) = (
                (box["x"] + box["width"] * across, box["y"] + box["height"] * down) for across, down in line
            )
            self.page.mouse.move(x, y)
            self.page.mouse.down()
            self.page.mouse.move(end_x, end_y, steps=4)
            self.page.mouse.up()
        expect(group.get_by_role("button", name="Undo", exact=True)).to_be_enabled(timeout=1000 * SECONDS)

    def wait_for_names(self) -> None:
        """Wait until every visible control has a name, which a screen reader says."""
        unnamed = """() => [...document.querySelectorAll("button, input, textarea, select, canvas")]
            .filter((e) => e.offsetParent !== null)
            .filter((e) => !(e.getAttribute("aria-label") || e.title || e.innerText.trim()
              || (e.labels && [...e.labels].some((label) => label.innerText.trim()))))
            .map((e) => e.outerHTML.slice(0, 200))"""
        try:
            self.page.wait_for_function(f"() => ({unnamed})().length === 0")
        except TimeoutError:
            assert self.page.evaluate(unnamed) == []

    def wait_for_status(self, pattern: str) -> str:
        """Wait until the line of text of the visible tab matches, and return it."""
        lines = self.page.locator(".status:visible")
        line = lines.filter(has_text=re.compile(pattern)).last
        try:
            line.wait_for()
        except TimeoutError:
            shown = lines.all_inner_texts() + self.page.locator(".toast-body").all_inner_texts()
            raise AssertionError(f"no status {pattern!r}, but {shown}") from None
        return line.inner_text()

    def wait_for_message(self, text: str) -> None:
        """Wait for a message in the corner of the page, and close it."""
        self.page.locator(".toast-body").get_by_text(re.compile(text, re.IGNORECASE)).first.wait_for()
        # In one step inside of the page, because a message may disappear by itself at any time.
        self.page.evaluate("document.querySelectorAll('.toast-close').forEach((button) => button.click())")

    def generate_others(self) -> None:
        """Press the button again, and wait for images that differ from those that are shown."""
        link = self.group(DOWNLOADS).get_by_role("link").first
        before = link.get_attribute("href") or ""
        self.press("Generate")
        expect(link).not_to_have_attribute("href", before, timeout=1000 * SECONDS)
        self.wait_for_status("images in")

    def download(self, number: int = 0) -> Image.Image:
        """Download one of the PNG files below the gallery, and return it with its metadata."""
        links = self.group(DOWNLOADS).get_by_role("link")
        links.nth(number).wait_for()
        with self.page.expect_download() as waiting:
            links.nth(number).click()
        with Image.open(waiting.value.path()) as image:
            image.load()
            return image

    def close(self) -> None:
        self.page.context.close()
