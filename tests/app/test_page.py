"""The page in a headless Chromium: ask, move the sliders, read the answers, look at the picture."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import pytest
from families import FAMILIES, small_checkpoint
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from app import EXAMPLES, PICTURES, Asker, Choice
from demo import load_pruned
from export import Base, export_model, own


CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PATIENCE = 60  # seconds
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,1500"),
)
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver, Debian's packages chromium and chromium-driver"
)


@contextmanager
def serving(folder: Path, *options: str):
    """The page's address, and the folder with the file of the addresses that the server has connected to."""
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("audited.py"), folder / "addresses", "--max-new-tokens", "12", *options],
            cwd=folder,
            env=os.environ | {"GRADIO_TEMP_DIR": str(folder / "temporary"), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 2 * PATIENCE
        while "Running on" not in (said := (folder / "output").read_text()):
            assert process.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.2)
        yield said.partition("Running on local URL:")[2].split()[0], folder
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM
        said = (folder / "output").read_text()
        assert "Traceback" not in said, said
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server")) as served:
        yield served


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """What a reader of the page sees and does."""

    def __init__(self, browser, address: str):
        self.browser = browser
        browser.get(address)
        self.wait(lambda: self.all("#ask"))

    def wait(self, condition):
        waiting = WebDriverWait(self.browser, PATIENCE, 0.1, [StaleElementReferenceException, AssertionError])
        return waiting.until(lambda _: condition())

    def all(self, selector: str) -> list:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str):
        self.wait(lambda: self.all(selector))
        return self.all(selector)[0]

    def text(self, selector: str) -> str:
        return "\n".join(element.text for element in self.all(selector))

    def ask(self, question: str | None = None):
        if question is not None:
            box = self.one("#question textarea")
            box.send_keys(Keys.CONTROL, "a")
            box.send_keys(Keys.DELETE)
            box.send_keys(question)
        self.one("#ask").click()

    def answers(self) -> list[str]:
        """Both, when they are there."""
        return self.wait(lambda: self.all(".costs") and [element.text for element in self.all(".answer")])

    def options(self) -> list[str]:
        """Those of the dropdown that is open."""
        return [element.get_property("textContent").strip("✓ \n") for element in self.all("[role=option]")]

    def cell(self, name: str) -> list[str]:
        """The values of a row of the table; none while there is no such row."""
        rows = [[cell.text for cell in row.find_elements(By.TAG_NAME, "td")] for row in self.all(".costs tr")]
        return next((row[1:] for row in rows if row and row[0] == name), [])

    def set_slider(self, name: str, value: float):
        box = self.one(f"#{name} input[type=number]")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(f"{value}", Keys.TAB)

    def kept(self, folder: Path) -> Image.Image:
        """The picture of what was kept, as it is shown."""
        element = self.one("#kept img")
        self.wait(lambda: element.get_property("naturalWidth"))
        (folder / "kept.png").write_bytes(element.screenshot_as_png)
        return Image.open(folder / "kept.png").convert("RGB")


@pytest.fixture
def page(browser, server):
    return Page(browser, server[0])


def num_bright(picture: Image.Image) -> int:
    """Pixels in the colors of frames, which are more saturated than what is dimmed to grey."""
    pixels = np.asarray(picture.resize((336, 351), Image.Resampling.NEAREST)).astype(int)
    return int((pixels.max(-1) - pixels.min(-1) > 60).sum())


def test_ask_look_and_ask_again(page, tmp_path):
    page.ask()
    assert page.answers() == ["CLIFF", "CLIFF"]
    assert page.cell("visual tokens") == ["576", "64", "-89%"]
    assert len(page.cell("time to the first token")) == len(page.cell("KV cache at the end")) == 3
    all_kept = num_bright(page.kept(tmp_path))
    assert all_kept > 1000

    source = page.one("#kept img").get_attribute("src")
    page.set_slider("step", 8)
    page.wait(lambda: page.one("#kept img").get_attribute("src") != source)
    assert num_bright(page.kept(tmp_path)) < all_kept / 3

    page.set_slider("ratio", 0.75)
    page.wait(lambda: "75.0%" in page.text("#about"))
    page.ask("What color is the star?")
    page.wait(lambda: page.cell("visual tokens") == ["576", "144", "-75%"])
    assert page.answers() == ["yellow", "yellow"]


def test_methods_and_presets_come_from_the_registry(page):
    page.one("#method input").click()
    page.wait(lambda: page.options() == list(own("pruning_methods.METHODS")))
    page.all("[role=option]")[page.options().index("divprune")].click()
    page.wait(lambda: "before" in page.text("#about") or "layer 0" in page.text("#about"))
    page.one("#preset input").click()
    page.wait(lambda: page.options() == ["paper"])


def test_numbers_are_typed_digit_by_digit(page, server, tmp_path):
    """The server is asked about each, also where Gradio's sliders refuse it."""
    box = page.one("#ratio input[type=number]")
    box.send_keys(Keys.CONTROL, "a")
    for typed, said in (
        (Keys.DELETE, "The ratio is a number"),
        ("0", "With a ratio of 0 nothing is pruned."),
        (".75", "75.0%"),
        ("\b\b\b7", "must be a number in [0, 1)"),
        ("\b.5", "50.0%"),
    ):
        box.send_keys(typed)
        page.wait(lambda said=said: said in page.text("#about"))
    page.ask()
    page.wait(lambda: page.cell("visual tokens") == ["576", "288", "-50%"])
    all_kept = page.kept(tmp_path).tobytes()
    source = page.one("#kept img").get_attribute("src")
    page.set_slider("step", 9)
    page.wait(lambda: page.one("#kept img").get_attribute("src") != source)
    page.set_slider("step", 999)
    page.wait(lambda: page.kept(tmp_path).tobytes() == all_kept)
    assert not page.all(".toast-body"), page.text(".toast-body")
    assert "Traceback" not in (server[1] / "output").read_text()


def test_an_example_brings_its_question(page):
    page.all("#examples button img")[1].click()
    page.wait(lambda: page.one("#question textarea").get_property("value") == EXAMPLES[1][1])


def test_sentences_for_empty_questions_and_bad_files(page, tmp_path):
    page.ask(" ")
    page.wait(lambda: page.text("#notice") == "Ask a question about the picture.")
    whole = (PICTURES / EXAMPLES[0][0]).read_bytes()
    (tmp_path / "broken.webp").write_bytes(whole[:2000])
    page.one("#picture button[aria-label='Clear'], #picture button[aria-label='Remove Image']").click()
    page.one("#picture input[type=file]").send_keys(str(tmp_path / "broken.webp"))
    page.wait(lambda: page.all("#picture img"))
    page.ask("Is there a star?")
    page.wait(lambda: page.text("#notice").startswith("broken.webp cannot be read as a picture: "))


def test_two_sessions_have_a_picture_each(page, browser, server, tmp_path):
    page.ask()
    page.answers()
    mine = page.kept(tmp_path).tobytes()
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    try:
        other = Page(browser, server[0])
        other.set_slider("ratio", 0.5)
        other.ask()
        other.answers()
    finally:
        browser.close()
        browser.switch_to.window(first)
    page.set_slider("step", 63)
    page.set_slider("step", 64)
    page.wait(lambda: page.kept(tmp_path).tobytes() == mine)


@pytest.mark.parametrize(("name", "num_grids"), [("qwen2_5_vl", 1), ("llava_next", 2)])
def test_exports_of_other_families(name, num_grids, browser, tmp_path):
    """Cost, order and picture are those of the request, also where an image has several grids."""
    repo = export_model(small_checkpoint(FAMILIES[name]), tmp_path / "pruned", report=lambda line: None)
    asker = Asker(*load_pruned(Base.open(str(repo)), str(repo)), max_new_tokens=12)
    *_, (_, pruned, drawing) = asker.answers(
        str(PICTURES / EXAMPLES[0][0]), EXAMPLES[0][1], Choice("vlm_pruner", "paper", 0.889)
    )
    assert len(pruned.record) == num_grids

    def is_shown(page: Page, first: int) -> bool:
        """Whether the page shows so many tokens of each grid, as closely as its file format keeps colors."""
        with urlopen(page.one("#kept img").get_attribute("src")) as file:
            shown = np.asarray(Image.open(BytesIO(file.read())).convert("RGB")).astype(int)
        expected = np.asarray(asker.draw(drawing, first)).astype(int)
        return shown.shape == expected.shape and np.abs(shown - expected).mean() < 4

    with serving(tmp_path, "--model", str(repo)) as (address, folder):
        page = Page(browser, address)
        assert repo.name in page.text("#title").split()
        page.ask()
        assert len(page.answers()) == 2
        assert page.cell("visual tokens")[:2] == [str(pruned.record.num_visual), str(pruned.record.num_kept)]
        assert f"of {drawing.num_steps}" in page.text("#step")
        page.wait(lambda: is_shown(page, drawing.num_steps))
        assert not is_shown(page, 1)
        page.set_slider("step", 1)
        page.wait(lambda: is_shown(page, 1))
        assert set((folder / "addresses").read_text().split()) <= {"127.0.0.1", "localhost", "None"}


def test_nothing_is_loaded_from_elsewhere(page, browser, server):
    """Comes last: what the browser has asked for in all of these tests, and what the server has connected to."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"}
    hosts = {urlsplit(url).hostname for url in urls if urlsplit(url).scheme in ("http", "https", "ws", "wss")}
    assert hosts == {"127.0.0.1"}, urls
    log = server[1] / "addresses"
    assert set(log.read_text().split() if log.exists() else []) <= {"127.0.0.1", "localhost", "None"}
