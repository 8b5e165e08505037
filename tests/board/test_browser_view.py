"""The run view in a browser: curves that can be explored, completions as groups, the list of runs, large files."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.report_runs import completion, write_lines, write_log

from .browser import (
    EVIL,
    append_line,
    choose,
    darken,
    open_run,
    serious_faults,
    write_run,
)


NUM_STEPS, GROUP_SIZE = 20_000, 8


@pytest.fixture(scope="module")
def page(shared_page: Page) -> Page:
    """One page for all: it has a model chosen."""
    choose(shared_page, "Model name", "Custom")
    return shared_page


@pytest.fixture
def saves(workplace: Path) -> Path:
    return workplace / "saves" / "Custom" / "lora"


def show(page: Page, name: str, tab: str = "Curves") -> None:
    open_run(page, name)
    expect(page.locator("#grpo_run_status .line")).to_contain_text(name)
    page.get_by_role("tab", name=tab).click()
    page.locator("#grpo_view .tabs").scroll_into_view_if_needed()
    page.evaluate("document.querySelector('#grpo_view .tabs').scrollIntoView()")


def drawn(page: Page, title: str) -> list[dict]:
    """The traces of a plot as plotly holds them, but for bands and raw lines: name, points, and line."""
    return page.evaluate(
        """title => [...document.querySelectorAll('#grpo_view figure')].filter(each =>
            each.querySelector('.title').textContent === title).flatMap(each =>
            (each.querySelector('.plot').data ?? []).filter(trace => trace.hoverinfo === 'none').map(trace =>
            ({name: trace.name, x: [...trace.x], mode: trace.mode, ...trace.line})))""",
        title,
    )


def wait_until_drawn(page: Page, title: str, num_curves: int) -> list[dict]:
    for _ in range(200):
        if len(found := drawn(page, title)) == num_curves:
            return found
        page.wait_for_timeout(100)
    raise AssertionError(f"{title}: {found}")


def test_curves(page: Page, saves: Path, missing_tool: Callable[[str], None]) -> None:
    write_run(saves / "curves", [{"reward": 0.5}], [(step, f"text of {step}") for step in (1, 5)])
    show(page, "curves")
    (single,) = wait_until_drawn(page, "Total reward", 1)
    assert (single["x"], single["mode"]) == ([1], "lines+markers")  # one point is visible
    for step in range(2, 11):
        append_line(saves / "curves", current_steps=step, reward=0.5, eval_reward=0.1 * step)
    curve, later = wait_until_drawn(page, "Total reward", 2)
    assert curve["x"] == list(range(1, 11))
    assert later["x"] == list(range(2, 11))
    assert curve["dash"] != later["dash"]
    assert curve["color"] != later["color"]

    figure = page.locator("#grpo_view figure").filter(has_text="Total reward")
    plot = figure.locator(".plot")
    box = plot.bounding_box()
    assert box is not None
    ticks = figure.locator(".xaxislayer-above text").all_inner_texts()
    assert all(tick.replace(",", "").isdecimal() for tick in ticks if tick)  # steps are whole

    # Zoom, and it stays while the run goes on.
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + 80)
    expect(figure.locator(".cursor")).to_be_visible()
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + 80, steps=5)
    page.mouse.up()
    whole_run = page.get_by_role("button", name="Whole run")
    expect(whole_run).to_be_visible()
    zoom = plot.evaluate("plot => plot.layout.xaxis.range")
    append_line(saves / "curves", current_steps=11, reward=0.5)
    expect(page.locator("#grpo_run_status")).to_contain_text("Step 11 of 100")
    page.wait_for_timeout(300)
    assert plot.evaluate("plot => plot.layout.xaxis.range") == zoom
    whole_run.click()

    # What is chosen is kept: a curve and a chart that are not wanted.
    page.get_by_role("button", name="eval_reward").click()
    wait_until_drawn(page, "Total reward", 1)
    page.locator("#grpo_run_menu summary").click()
    kept = json.loads(page.evaluate("localStorage['grpo-run-view']"))
    assert [name for name, is_hidden in kept["hidden"].items() if is_hidden] == ["Total reward//eval_reward"]
    page.locator("#grpo_run_menu").get_by_label("Total reward").uncheck()
    expect(figure).to_have_count(0)
    page.locator("#grpo_run_menu").get_by_label("Total reward").check()
    page.locator("#grpo_run_menu summary").click()
    wait_until_drawn(page, "Total reward", 1)
    page.get_by_role("button", name="eval_reward").click()

    # In the dark the plots are dark.
    def paper() -> str:
        return plot.evaluate("plot => plot.layout.paper_bgcolor")

    wait_until_drawn(page, "Total reward", 2)
    light = paper()
    assert serious_faults(page, ["#grpo_run"], missing_tool) == []
    darken(page)
    page.wait_for_function(
        "light => document.querySelector('#grpo_view .plot').layout.paper_bgcolor !== light", arg=light
    )
    assert serious_faults(page, ["#grpo_run"], missing_tool) == []
    darken(page, False)

    # A click on a step opens its completions.
    plot.click(position={"x": box["width"] * 0.5, "y": 80})
    expect(page.get_by_role("tab", name="Completions")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#grpo_run_table")).to_contain_text("text of 5")
    page.set_viewport_size({"width": 390, "height": 800})
    page.get_by_role("tab", name="Curves").click()
    assert page.locator("#grpo_view").evaluate("view => view.scrollWidth <= view.clientWidth + 1")
    page.set_viewport_size({"width": 1280, "height": 900})


def test_completions_runs_and_alarms(page: Page, saves: Path, missing_tool: Callable[[str], None]) -> None:
    write_log(saves / "groups", 30)
    long_text = "<think>\nfirst line\n\n    an indented one\n</think>" + "word " * 2000 + "THE END"
    rows = [completion(step, i % 2, f"{EVIL} {step}.{i}", reward=i / 4) for step in (10, 20) for i in range(4)]
    rows[0] |= {"completion": long_text, "finish_reason": "length", "prompt": EVIL}
    write_lines(saves / "groups" / "completions.jsonl", rows)
    words = dict.fromkeys(("seen", "meaning", "remedy"), EVIL)
    alarm = {"monitor": "kl", "step": 10, "onset": 9, "action": "warn", **words, "settings": {"beta": 0.07}}
    write_lines(saves / "groups" / "alarms.jsonl", [alarm])
    with (saves / "groups" / "trainer_log.jsonl").open("ab") as log:
        log.write(b'{"torn": \n\xff\xfe\x00\n')
    show(page, "groups", "Completions")
    status, table = page.locator("#grpo_run_status"), page.locator("#grpo_run_table")
    expect(status).to_contain_text("Damaged lines of trainer_log.jsonl that are left out: 2.")
    expect(table).to_contain_text("Completions of step 20: 2 groups.")
    expect(table.locator(".answer")).to_have_count(4)
    page.get_by_role("button", name="Put it into the form").click()
    expect(page.locator("#grpo_beta input")).to_have_value("0.07")
    page.locator("#grpo_view .alarms").get_by_role("button", name="step 10").click()
    expect(table).to_contain_text("Completions of step 10: 2 groups.")
    expect(table.locator("details.thinking")).to_have_count(1)
    page.get_by_role("button", name="Show all").click()
    expect(table).to_contain_text("THE END")
    table.locator("details.thinking summary").click()
    assert "first line\n\n    an indented one" in table.locator("details.thinking .text").inner_text()
    page.get_by_role("button", name="Over 2 steps").first.click()
    expect(table.locator(".times ins").first).to_be_visible()

    table.get_by_label("all steps").check()
    table.get_by_label("Text").fill("20.3")
    expect(table.locator(".answer:not(.other)")).to_have_count(1)
    expect(table.locator(".answer:not(.other)")).to_contain_text("20.3")
    table.get_by_label("Text").fill("")
    table.get_by_label("truncated only").check()
    expect(table.locator(".group")).to_have_count(1)
    table.get_by_label("truncated only").uncheck()
    table.get_by_label("all steps").uncheck()
    table.get_by_label("Step", exact=True).fill("99")
    expect(table).to_contain_text("There is no step 99")
    expect(table.locator(".answer").first).to_be_visible()
    assert page.locator("#grpo_view :is(img, script, a)").count() == 0
    for is_dark in (True, False):
        darken(page, is_dark)
        assert serious_faults(page, ["#grpo_run"], missing_tool) == []
    assert page.title() != "evil"

    # Two runs in the same plots, and their files.
    write_log(saves / "groups-too", 30, seed=1)
    page.get_by_role("tab", name="Runs").click()
    runs = page.locator("#grpo_run_list")
    runs.get_by_label("Compare Custom/lora/groups-too").check()
    page.get_by_role("tab", name="Curves").click()
    page.get_by_role("button", name="More charts").click()
    names = [curve["name"] for curve in wait_until_drawn(page, "Entropy", 2)]
    assert names == ["groups", "groups-too"]
    for name, content in (("Curves (CSV)", "step,"), ("Completions (JSONL)", '{"step"'), ("Report (HTML)", "<!")):
        with page.expect_download() as download:
            page.get_by_role("button", name=name).click()
        assert Path(download.value.path()).read_text().startswith(content)
    with page.expect_download() as download:
        page.locator("#grpo_view figure").first.get_by_role("button", name="PNG").click()
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")
    page.get_by_role("tab", name="Runs").click()
    runs.get_by_label("Compare Custom/lora/groups-too").uncheck()
    runs.get_by_role("button", name="Custom/lora/groups-too").click()
    expect(status.locator(".line")).to_contain_text("groups-too")
    page.get_by_role("button", name="Back to the form's run").click()
    expect(status).to_contain_text("Damaged lines")
    page.get_by_role("tab", name="Runs").click()
    expect(runs.locator("tbody tr").first).to_be_visible()
    for is_dark in (True, False):
        darken(page, is_dark)
        assert serious_faults(page, ["#grpo_run"], missing_tool) == []


def test_a_large_run_opens_at_once_and_loses_no_line(page: Page, saves: Path) -> None:
    """20,000 log lines and 160,000 completions, 200 MB."""
    folder = saves / "large"
    (folder / "checkpoint-1").mkdir(parents=True)
    metrics = {f"rewards/{name}/mean": 0.5 for name in ("accuracy", "format")}
    progress = {"total_steps": NUM_STEPS, "percentage": 50, "elapsed_time": "0:01", "remaining_time": "0:01"}
    with (folder / "trainer_log.jsonl").open("w") as log:
        for step in range(1, NUM_STEPS + 1):
            log.write(json.dumps({"current_steps": step, **progress, "reward": step / NUM_STEPS, **metrics}) + "\n")
    texts = {"prompt": "What is 1 + 1? " * 8, "reference": "2", "rewards": {"accuracy": 1.0}}
    rest = json.dumps({**texts, "completion": "The answer is 2. " * 60, "finish_reason": "stop"})[1:-1]
    with (folder / "completions.jsonl").open("w") as file:
        for i in range(NUM_STEPS * GROUP_SIZE):
            file.write(
                f'{{"step": {1 + i // GROUP_SIZE}, "prompt_index": {i // GROUP_SIZE % 500}, "reward": {i}, {rest}}}\n'
            )
    assert (folder / "completions.jsonl").stat().st_size > 190e6
    page.get_by_role("tab", name="Completions").click()
    field = page.get_by_label("Output dir", exact=True)
    field.fill("large")
    started = time.perf_counter()
    field.press("Enter")
    page.wait_for_function(
        f"document.querySelector('#grpo_run_table')?.innerText.includes('Completions of step {NUM_STEPS}:')"
    )
    seconds = time.perf_counter() - started
    print(f"opened in {seconds:.2f} s")
    page.get_by_role("tab", name="Curves").click()
    page.evaluate("document.querySelector('#grpo_view .tabs').scrollIntoView()")
    (curve,) = wait_until_drawn(page, "Total reward", 1)
    assert (len(curve["x"]), curve["x"][-1]) == (500, NUM_STEPS)
    for step in range(NUM_STEPS + 1, NUM_STEPS + 4):
        append_line(folder, current_steps=step, reward=9.0)
    expect(page.locator("#grpo_run_status")).to_contain_text(f"Step {NUM_STEPS + 3} of")
    with page.expect_download() as download:
        page.get_by_role("button", name="Curves (CSV)").click()
    lines = Path(download.value.path()).read_text().splitlines()
    assert [int(line.split(",")[0]) for line in lines[1:]] == list(range(1, NUM_STEPS + 4))
    assert seconds < 20  # 3 on an idle machine; the reading alone has its bound in tests/unit/test_run_files.py
    (folder / "completions.jsonl").unlink()
