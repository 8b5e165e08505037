"""What the tests of the Board in a browser do with a page."""

import importlib
import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page, expect
from playwright.sync_api import TimeoutError as PlaywrightTimeoutError

from grpo_stage.board.locales import texts


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE_MS = 60_000
EVIL = "<img src=x onerror=\"document.title='evil'\"><script>document.title='evil'</script>&amp;"
PROGRESS = {"total_steps": 100, "percentage": 50, "elapsed_time": "0:01", "remaining_time": "0:01"}


def open_board(page: Page, url: str) -> None:
    """Open the Board, and choose the stage."""
    page.route("https://**", lambda route: route.abort())  # web fonts
    page.goto(url)
    page.wait_for_function("document.querySelector('input[aria-label=\"Output dir\"]')?.value.startsWith('train_')")
    choose(page, "Stage", "GRPO")
    expect(page.locator("#grpo_tab")).to_be_visible()


def choose(page: Page, label: str, option: str) -> None:
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()


def fold(page: Page, group: str) -> None:
    """Open or close a group of the panel."""
    page.locator(f"#grpo_group_{group} > button.label-wrap").click()


def import_recipe(page: Page, path: Path) -> None:
    page.locator("#grpo_tab input[type=file]").set_input_files(path)
    expect(page.get_by_text(texts("en")["messages"]["imported"])).to_be_visible()


def text_field(page: Page, label: str) -> Locator:
    """A field whose label holds what it says below as well."""
    return page.locator("label").filter(has=page.get_by_text(label, exact=True)).locator("input, textarea").first


def value_of(page: Page, label: str) -> str:
    return page.get_by_label(label, exact=True).first.input_value()


def containing(text: str) -> re.Pattern[str]:
    return re.compile(re.escape(text))


def step_shown(page: Page) -> int:
    match = re.search(r"Step (\d+) of", page.locator("#grpo_run_status").inner_text())
    assert match is not None
    return int(match[1])


def write_run(folder: Path, metrics: Sequence[dict[str, Any]], texts: Sequence[tuple[int, str]] = ()) -> None:
    """A run's files: the metrics of steps 1, 2, ..., and completions by step."""
    (folder / "checkpoint-1").mkdir(parents=True)
    for step, line in enumerate(metrics, start=1):
        append_line(folder, current_steps=step, **line)
    record = {"prompt": "What is 1 + 1?", "reference": "2", "rewards": {"accuracy": 1.0}, "reward": 1.0}
    ending = {"advantage": 0.5, "num_tokens": 9, "finish_reason": "stop"}
    with (folder / "completions.jsonl").open("w") as completions:
        for step, text in texts:
            completions.write(json.dumps({"step": step, **record, "completion": text, **ending}) + "\n")


def append_line(folder: Path, **values: Any) -> None:
    """Another line of a run's log."""
    with (folder / "trainer_log.jsonl").open("a") as log:
        log.write(json.dumps({**PROGRESS, **values}) + "\n")


def dataset_field(page: Page) -> Locator:
    """The host's field of the tab for training; others of its name stand behind it."""
    return page.get_by_label("Dataset", exact=True).first


def list_run(page: Page, name: str) -> Locator:
    """A run in the list of output folders, as a person finds it: the host lists them when the field is entered.

    The list may be that of the model chosen before, if its event is still on its way. A person looks again.
    """
    field, run = page.get_by_label("Output dir", exact=True), page.get_by_role("option", name=name, exact=True)
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while time.monotonic() < deadline:
        field.click()
        with suppress(PlaywrightTimeoutError):
            run.wait_for(timeout=3_000)
            break
        page.locator("body").click(position={"x": 2, "y": 2})  # leave the field
        page.keyboard.press("Escape")
    expect(run).to_be_visible()
    return run


def open_run(page: Page, name: str) -> None:
    """Type the name of a run, as a person would."""
    page.get_by_label("Output dir", exact=True).fill(name)
    page.get_by_label("Output dir", exact=True).press("Enter")


def darken(page: Page, is_dark: bool = True) -> None:
    """Turn the page's theme, as its footer does."""
    page.evaluate("isDark => document.body.classList.toggle('dark', isDark)", is_dark)


_NOTHING_FADES = """
() => document.getAnimations().every(
    (each) => each.playState !== "running" || each.effect.getComputedTiming().iterations === Infinity
)
"""


def serious_faults(page: Page, parts: Sequence[str], missing_tool: Callable[[str], None]) -> list[str]:
    """What axe-core finds in parts of the page, by their selectors."""
    try:
        axe = importlib.import_module("axe_playwright_python.sync_playwright").Axe()
    except ImportError:
        missing_tool("Faults of access are found by axe-core, which `axe-playwright-python` brings.")
    page.wait_for_function(_NOTHING_FADES)  # what does has a color of its own for a moment
    found = axe.run(page, context={"include": [[part] for part in parts]}).response["violations"]
    return [
        f"{fault['id']}: {node['html'][:200]} {node['failureSummary']}"
        for fault in found
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"][:3]
    ]
