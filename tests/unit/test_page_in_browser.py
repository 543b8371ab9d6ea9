"""The pages in Debian's Chromium: no wider than a telephone, legible in light and in dark mode, a filter that works.

Skipped where there is no browser or no Playwright (`pip install playwright`; `apt-get install chromium`).
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mllm_keeplora.continual.saved_run import load_run
from mllm_keeplora.reports.comparison import PAGE, compare_runs
from mllm_keeplora.reports.page import write_report
from mllm_keeplora.runs.run_directory import RunDirectory
from tests.unit.test_comparison import retention_of, save_run
from tests.unit.test_page_answers import HOSTILE_TEXTS, noise, save, saved_line

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

TASKS = ["digits", "charts", "clocks", "grounds"]  # of the small stream
PHONE, DESK = {"width": 400, "height": 800}, {"width": 1280, "height": 900}

# Of every element with text of its own: contrast by WCAG 2.2 with the nearest background, size and place.
TEXTS = """() => {
  const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1});
  const brush = canvas.getContext("2d", {willReadFrequently: true});
  const seen = {};
  const rgb = (colour) => seen[colour] ??= (() => {
    brush.clearRect(0, 0, 1, 1); brush.fillStyle = colour; brush.fillRect(0, 0, 1, 1);
    return [...brush.getImageData(0, 0, 1, 1).data];
  })();
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || ["SCRIPT", "STYLE", "OPTION"].includes(element.tagName) || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const ink = rgb(element.closest("svg") ? style.fill : style.color);
    let behind = element;
    while (behind && rgb(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
    const paper = rgb(getComputedStyle(behind ?? document.body).backgroundColor);
    const [high, low] = [light(ink), light(paper)].sort((a, b) => b - a);
    const scale = element.closest("svg") ? element.getBoundingClientRect().height / (element.getBBox().height || 1) : 1;
    found.push([element.textContent.slice(0, 40), (high + 0.05) / (low + 0.05), parseFloat(style.fontSize) * scale]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run's page with hostile answers, and a comparison of two runs."""
    root = tmp_path_factory.mktemp("pages")
    picture = noise(root / "picture.png", 0)
    learnt = retention_of(1.0, 1.0, tasks=TASKS)
    for row in learnt["rows"]:
        for name in TASKS:  # right or wrong: of all right, the interval is the longest text
            row["scores"][name]["stderr"] = 0.0 if row["scores"][name]["value"] == 1 else 0.019
    runs = [
        save_run(root / "ours", learnt),
        save_run(root / "plain", retention_of(1.0, 0.3, method="lora", tasks=TASKS)),
    ]
    for run_dir, lost in zip(runs, (2, 7), strict=True):
        for stage, task in enumerate([None, *TASKS]):
            for name in TASKS:
                lines = [
                    saved_line(
                        i, 100.0 * (i >= lost or 0 < stage < 3), reply=text, asked=text, media=[("image", picture)]
                    )
                    for i, text in enumerate(HOSTILE_TEXTS)
                ]
                save(RunDirectory(run_dir).stage(stage, task).replies / f"{name}.jsonl", lines)
    write_report(load_run(runs[0]))
    compare_runs(runs, root / "out")
    return {"run": RunDirectory(runs[0]).report, "comparison": root / "out" / PAGE}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


def opened(browser: Any, path: Path, size: dict[str, int], scheme: str) -> Any:
    page = browser.new_page(viewport=size, color_scheme=scheme)
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach((found) => found.open = true)")
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("name", ["run", "comparison"])
def test_pages_fit_and_can_be_read(
    browser: Any, pages: dict[str, Path], name: str, size: dict[str, int], scheme: str
) -> None:
    page = opened(browser, pages[name], size, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
    texts = page.evaluate(TEXTS)
    assert len(texts) > 200
    assert not [found for found in texts if found[1] < 4.5], "contrast AA"
    assert not [found for found in texts if found[2] < 9.9], "text of under 10 pixels"
    page.close()


def test_general_ability_is_in_sight_on_a_telephone(browser: Any, pages: dict[str, Path]) -> None:
    page = opened(browser, pages["run"], PHONE, "light")
    page.evaluate("document.querySelector('#matrix').scrollIntoView()")
    for cell in page.query_selector_all("#matrix .general"):
        box = cell.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]
    page.close()


def test_the_matrix_of_the_small_stream_fits_a_telephone(browser: Any, pages: dict[str, Path]) -> None:
    """Without a column under another."""
    page = opened(browser, pages["run"], PHONE, "light")
    assert page.evaluate("(([box]) => box.scrollWidth <= box.clientWidth)(document.querySelectorAll('#matrix .wide'))")
    page.close()


@pytest.mark.parametrize("name", ["run", "comparison"])
def test_tables_of_few_columns_become_lists_on_a_telephone(browser: Any, pages: dict[str, Path], name: str) -> None:
    page = opened(browser, pages[name], PHONE, "light")
    wide = """[...document.querySelectorAll('.cards .wide')].map((box) => [box.scrollWidth, box.clientWidth])"""
    found = page.evaluate(wide)
    assert len(found) >= 3 and all(needed <= there for needed, there in found)
    page.close()


@pytest.mark.parametrize("name", ["run", "comparison"])
def test_no_number_is_broken_on_a_telephone(browser: Any, pages: dict[str, Path], name: str) -> None:
    """Also beside a label of several lines."""
    page = opened(browser, pages[name], PHONE, "light")
    broken = """[...document.querySelectorAll('.cards td:not(.text)')].filter((cell) => {
      const text = document.createRange();
      text.selectNodeContents(cell);
      return new Set([...text.getClientRects()].map((line) => line.top)).size > 1;
    }).map((cell) => cell.textContent).filter((text) => !text.includes(' '))"""
    assert page.evaluate(broken) == []
    page.close()


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_the_filter_finds_questions_by_what_became_of_them_and_by_words(
    browser: Any, pages: dict[str, Path], size: dict[str, int]
) -> None:
    said: list[str] = []
    page = browser.new_page(viewport=size)
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(pages["run"].as_uri())
    box = page.locator(".answers").first
    assert not box.locator(".filter").is_visible()  # closed
    box.locator("summary").click()
    rows = box.locator("tbody tr:visible")
    assert rows.count() == len(HOSTILE_TEXTS)
    assert "right after 2, wrong after 3" in rows.first.inner_text()
    box.locator("select").select_option(label="lost (2)")
    assert rows.count() == 2 and box.locator("output").inner_text() == "2 of 10 shown"
    box.locator("input").fill("ALERT(1)</script>")
    assert rows.count() == 2
    box.locator("input").fill("no such words")
    assert rows.count() == 0
    box.locator("select").select_option("")
    box.locator("input").fill("{{ 7 * 7 }}")
    assert rows.count() == 1
    assert said == []
    page.close()


def test_answers_are_there_without_scripts(browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["run"].as_uri())
    box = page.locator(".answers").first
    box.locator("summary").click()
    assert box.locator("tbody tr:visible").count() == len(HOSTILE_TEXTS)
    assert not box.locator(".filter").is_visible()
    context.close()
