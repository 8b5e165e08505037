"""The page of `grpo-stage report` in a browser."""

import re
from pathlib import Path

from playwright.sync_api import Browser, expect

from grpo_stage.report.facts import facts_of
from grpo_stage.report.page import page_of
from tests.report_runs import completion, write_lines, write_log

from .browser import EVIL, PATIENCE_MS


# From the start of loading until the first curve is drawn.
DRAWN_MS = """() => new Promise((done) => {
    const look = () => document.querySelector("figure .curve") ? done(performance.now()) : requestAnimationFrame(look);
    look();
})"""


def test_the_report_of_ten_thousand_steps(chromium: Browser, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        write_log(tmp_path / name, 10_000, seed, eval_steps=500)
    alarm = {"monitor": "kl", "step": 6000, "onset": 5000, **dict.fromkeys(("seen", "meaning", "remedy"), EVIL)}
    write_lines(tmp_path / "one" / "alarms.jsonl", [alarm])
    write_lines(tmp_path / "two" / "alarms.jsonl", [])
    texts = [completion(step, 0, f"{EVIL} {step}", prompt=EVIL) for step in range(1, 200)]
    write_lines(tmp_path / "one" / "completions.jsonl", texts)
    file = tmp_path / "report.html"
    file.write_text(page_of(facts_of([tmp_path / "one", tmp_path / "two"], {})), encoding="utf-8")
    assert file.stat().st_size < 2e6

    context = chromium.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    asked, problems = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))

    def open_page() -> float:
        page.goto(file.as_uri())
        return page.evaluate(DRAWN_MS)

    def background() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    assert min(open_page() for _ in range(3)) < 2000  # the machine may be busy once
    light = background()
    page.emulate_media(color_scheme="dark")
    dark = background()
    assert dark != light
    page.get_by_label("dark or light").click()
    assert background() == light

    figure = page.locator("figure").filter(has_text="Total reward")
    figure.locator(".plot").hover(position={"x": 200, "y": 80})
    tip = page.locator("#tip")
    expect(tip).to_have_text(
        re.compile(r"step [\d,]+.*one · reward0\.\d+ \(0\.\d+ to 0\.\d+\).*two · eval_reward \(step \d+\)0\.")
    )
    page.get_by_role("button", name="one · reward").click()  # its key in the legend
    figure.locator(".plot").hover(position={"x": 210, "y": 80})
    expect(tip).not_to_contain_text("one · reward")
    figure.locator("details").click()
    expect(figure.locator("dd").first).to_contain_text("mean over completions")

    expect(page.locator(".alarm")).to_contain_text(EVIL)
    expect(page.locator(".thread li").last).to_contain_text(f"{EVIL} 149199")
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.evaluate("dispatchEvent(new Event('beforeprint'))")  # every plot is drawn, those far below as well
    assert page.locator("figure:not(:has(svg .curve, svg .area, svg .point)) .plot").count() == 0
    assert page.title() != "evil"
    assert set(asked) == {file.as_uri()}
    assert problems == []
    context.close()
