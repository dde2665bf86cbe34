"""The page in a real browser: no request, no error, every control works, nothing runs over."""

from __future__ import annotations

import base64
import csv
import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from reports import chromium as chromium
from reports import made as made

SCREENSHOTS = Path(__file__).resolve().parents[2] / "screenshots"
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


def show(chromium: Any, path: Path, size: str = "desktop", scheme: str = "light") -> None:
    width, height = SIZES[size]
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    wanted = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in wanted.items()]
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    for kind in ("browser", "performance"):
        chromium.get_log(kind)  # forget what was before
    chromium.get(path.as_uri())


def all_of(chromium: Any, selector: str) -> list[Any]:
    return chromium.find_elements("css selector", selector)


def one(chromium: Any, selector: str) -> Any:
    return chromium.find_element("css selector", selector)


def shown(chromium: Any, selector: str) -> list[Any]:
    return [element for element in all_of(chromium, selector) if element.is_displayed()]


def requests(chromium: Any) -> list[str]:
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    sent = [
        e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in sent if not url.startswith("data:")]


def press(chromium: Any, element: Any) -> None:
    chromium.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


def test_it_opens_from_disk_without_a_request_or_an_error(chromium: Any, made: Path) -> None:
    page = made / "page.html"
    show(chromium, page)
    assert requests(chromium) == [page.as_uri()]
    assert chromium.get_log("browser") == []
    broken = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert chromium.execute_script(broken) == 0
    assert len(all_of(chromium, "#samples img")) == 12
    assert len(all_of(chromium, "#pca img")) == 36


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_nothing_runs_over_and_everything_can_be_read(
    chromium: Any, made: Path, size: str, scheme: str
) -> None:
    show(chromium, made / "page.html", size, scheme)
    width = SIZES[size][0]
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
    for details in all_of(chromium, "details"):
        chromium.execute_script("arguments[0].open = true", details)
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
    cut = chromium.execute_script("""
        const inside = (e) => e.closest('.scroll') || e.closest('svg') || e.closest('.skip');
        return [...document.querySelectorAll('main *, header *')]
            .filter(e => e.getClientRects().length && !inside(e)
                && e.getBoundingClientRect().right > innerWidth + 0.5)
            .map(e => e.outerHTML.slice(0, 80));""")
    assert cut == []
    faint = chromium.execute_script(CONTRAST)
    assert faint == []
    height = min(chromium.execute_script("return document.documentElement.scrollHeight"), 16_000)
    whole = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", whole)
    picture = chromium.execute_cdp_cmd("Page.captureScreenshot", {})
    SCREENSHOTS.mkdir(exist_ok=True)
    file = SCREENSHOTS / f"report-{size}-{scheme}.png"
    file.write_bytes(base64.b64decode(picture["data"]))
    assert file.stat().st_size > 50_000


CONTRAST = """
const light = (c) => c.map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
const colour = (t) => t.match(/[\\d.]+/g).map(Number);
const behind = (e) => {
    for (; e; e = e.parentElement) {
        const c = colour(getComputedStyle(e).backgroundColor);
        if (c.length < 4 || c[3] > 0) return c.slice(0, 3);
    }
    return [255, 255, 255];
};
const out = [];
for (const e of document.querySelectorAll('main *, header *, footer *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.getClientRects().length) continue;
    const svg = e.closest('svg');
    const ink = colour(getComputedStyle(e)[svg ? 'fill' : 'color']).slice(0, 3);
    const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) out.push([e.textContent.trim().slice(0, 40), ink, behind(e)]);
}
return out;
"""
"""Texts whose contrast to what is behind them is below WCAG's 4.5 : 1."""


def test_pointing_at_a_plan_shows_it_and_its_command(chromium: Any, made: Path) -> None:
    from selenium.webdriver import ActionChains

    show(chromium, made / "page.html")
    points = json.loads((made / "sweep" / "sweep.json").read_text())["points"]
    for place in (0, 6):
        mark = shown(chromium, ".marks [role=radio]")[place]
        chromium.execute_script("arguments[0].scrollIntoView({block: 'center'})", mark)
        ActionChains(chromium).move_to_element(mark).perform()
        tip = one(chromium, "#tip")
        assert tip.is_displayed()
        removed = points[place]["removed"]
        assert f"{removed} block" in tip.text
        assert f"KL {points[place]['held_out']['kl']:.4f}" in tip.text
        assert f"top-1 {points[place]['top1']:.2%}" in tip.text
        assert f"{points[place]['latency']['ratio']:.1%} of the latency" in tip.text
        assert "blockfit compress" in tip.text
        box = chromium.execute_script("return arguments[0].getBoundingClientRect().toJSON()", tip)
        assert box["left"] >= 0
        assert box["right"] <= 1280
        mark.click()
        assert [e.get_attribute("id") for e in shown(chromium, ".plan")] == [f"plan-{removed}"]


def test_every_quality_stands_against_parameters_flops_and_latency(
    chromium: Any, made: Path
) -> None:
    show(chromium, made / "page.html")
    points = json.loads((made / "sweep" / "sweep.json").read_text())["points"]
    qualities = [radio.get_attribute("value") for radio in all_of(chromium, 'input[name="loss"]')]
    assert qualities == ["kl", "top1", "agreement", "feature_relative_error"]
    press(chromium, one(chromium, 'input[name="loss"][value="top1"]'))
    sizes_known = [radio.get_attribute("value") for radio in all_of(chromium, 'input[name="size"]')]
    assert sizes_known == ["parameters", "flops", "latency", "megabytes"]
    for size in sizes_known:
        press(chromium, one(chromium, f'input[name="size"][value="{size}"]'))
        (plot,) = shown(chromium, "[data-loss]")
        assert plot.get_attribute("data-loss") == "top1"
        assert plot.get_attribute("data-size") == size
        assert plot.find_elements("xpath", './/*[name()="text"][.="original"]')
        marks = plot.find_elements("css selector", "[role=radio]")
        assert len(marks) == len(points)
        sizes = [p["latency"]["ratio"] if size == "latency" else p["parameters"] for p in points]
        across = [m.rect["x"] + m.rect["width"] / 2 for m in marks]
        down = [m.rect["y"] + m.rect["height"] / 2 for m in marks]
        for values, drawn in ((sizes, across), ([-p["top1"] for p in points], down)):
            in_order = [place for _, place in sorted(zip(values, drawn, strict=True))]
            assert all(a <= b + 1 for a, b in pairwise(in_order))
    table = one(chromium, "#all-plans").text
    assert "Latency" in table
    assert "Top-1" in table


def test_plans_and_cells_are_reached_by_keys(chromium: Any, made: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    show(chromium, made / "page.html")
    body = one(chromium, "body")
    seen: list[str] = []
    for _ in range(250):
        chromium.switch_to.active_element.send_keys(Keys.TAB)
        active = chromium.switch_to.active_element
        if active == body:
            break
        seen.append(active.get_attribute("outerHTML")[:400])
    assert "Skip to the content" in seen[0]
    for control in ('id="theme"', 'name="loss"', 'role="radio"', 'class="copy', 'class="choose',
                    'name="size"', 'class="csv', 'name="metric"', 'name="tokens"', "plot cells",
                    "<summary"):  # fmt: skip
        assert any(control in text for text in seen), control
    mark = one(chromium, '.marks [role=radio][aria-checked="true"]')
    chromium.execute_script("arguments[0].focus()", mark)
    before = mark.get_attribute("data-plan")
    chromium.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    now = chromium.switch_to.active_element.get_attribute("data-plan")
    assert now != before
    assert [e.get_attribute("data-plan") for e in shown(chromium, ".plan")] == [now]
    assert one(chromium, "#tip").is_displayed()
    chromium.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not one(chromium, "#tip").is_displayed()
    chromium.execute_script("arguments[0].focus()", shown(chromium, ".cells")[0])
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN):
        chromium.switch_to.active_element.send_keys(key)
    tables = json.loads((made / "analysis" / "analysis.json").read_text())["similarity"]
    assert (
        one(chromium, "#cell").text == f"h[1] and h[2]: {tables['metrics']['r2']['all'][1][2]:.3g}"
    )


def test_every_control_does_what_it_says(chromium: Any, made: Path) -> None:
    show(chromium, made / "page.html")
    themes = []
    for _ in range(3):
        one(chromium, "#theme").click()
        ink = chromium.execute_script("return getComputedStyle(document.body).backgroundColor")
        themes.append((one(chromium, "#theme").text, ink))
    assert [text for text, _ in themes] == ["Colours: light", "Colours: dark", "Colours: auto"]
    assert themes[0][1] == themes[2][1] != themes[1][1]
    for name, group in (
        ("loss", "[data-loss]"),
        ("size", "[data-size]"),
        ("metric", ".heat"),
        ("tokens", ".heat"),
    ):
        looks = set()
        for radio in all_of(chromium, f'input[name="{name}"]'):
            press(chromium, radio)
            visible = shown(chromium, group)
            assert len(visible) == 1
            assert visible[0].get_attribute(f"data-{name}") == radio.get_attribute("value")
            looks.add(visible[0].get_attribute("outerHTML"))
        assert len(looks) == len(all_of(chromium, f'input[name="{name}"]')) > 1
    for button in all_of(chromium, ".choose"):
        press(chromium, button)
        assert [e.get_attribute("data-plan") for e in shown(chromium, ".plan")] == [button.text]
    for summary in shown(chromium, "summary"):
        press(chromium, summary)
        assert chromium.execute_script("return arguments[0].parentElement.open", summary)
    for button in shown(chromium, ".copy"):
        press(chromium, button)
        chromium.execute_async_script("setTimeout(arguments[0], 50)")
        assert button.text in ("Copied", "Selected")
    for link in shown(chromium, "nav a"):
        chromium.execute_script("scrollTo(0, 0)")
        link.click()
        target = link.get_attribute("href").partition("#")[2]
        assert one(chromium, f"#{target}").is_displayed()
    assert chromium.get_log("browser") == []
    assert requests(chromium) == [(made / "page.html").as_uri()]


def test_it_prints_without_its_controls(chromium: Any, made: Path) -> None:
    show(chromium, made / "page.html")
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not shown(chromium, ".needs-script, nav, #tip")
    printed = chromium.execute_cdp_cmd("Page.printToPDF", {})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_a_hostile_folder_runs_nothing(chromium: Any, made: Path) -> None:
    page = made / "hostile.html"
    show(chromium, page)
    assert chromium.execute_script("return window.hacked") is None
    assert chromium.get_log("browser") == []
    assert requests(chromium) == [page.as_uri()]
    assert "window.hacked=1" in one(chromium, "h1").text
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= 1280


def test_runs_are_told_apart_and_hidden(chromium: Any, made: Path) -> None:
    show(chromium, made / "several.html")
    boxes = all_of(chromium, 'input[name="run"]')
    points = json.loads((made / "few" / "sweep.json").read_text())["points"]
    assert len(boxes) == len(points) == 3
    assert len(shown(chromium, ".marks [role=radio]")) == 2 * len(points) + 1
    press(chromium, boxes[0])
    assert len(shown(chromium, ".marks [role=radio]")) == len(points) + 1
    assert len(shown(chromium, "#all-plans tbody tr")) == len(points) + 1
    assert not shown(chromium, ".marks g.run-0")
    press(chromium, boxes[0])
    assert len(shown(chromium, ".marks [role=radio]")) == 2 * len(points) + 1
    assert "right" in one(chromium, "#flips").text
    assert chromium.get_log("browser") == []


def test_a_table_is_taken_away_as_csv(chromium: Any, made: Path) -> None:
    show(chromium, made / "several.html")
    link = one(chromium, "#flips .csv")
    chromium.execute_script("arguments[0].addEventListener('click', e => e.preventDefault())", link)
    press(chromium, link)
    text = unquote(link.get_attribute("href").partition(",")[2]).removeprefix("\ufeff")
    rows = list(csv.reader(io.StringIO(text)))
    told = json.loads((made / "evaluation.json").read_text())
    assert rows[0][0] == "Image"
    assert len(rows) == 1 + told["flipped"] > 1
    assert [row[4] for row in rows[1:]] == [f"{flip['cost']:.4f}" for flip in told["flips"]]


def test_the_navigation_stays_and_tables_say_that_they_scroll(chromium: Any, made: Path) -> None:
    show(chromium, made / "several.html", "phone")
    chromium.execute_script("scrollTo(0, 3000)")
    assert chromium.execute_script(
        "return document.querySelector('nav').getBoundingClientRect().top"
    ) == pytest.approx(0, abs=1)
    table = one(chromium, "#all-plans").find_element("xpath", "..")
    assert "right" in table.get_attribute("class").split()
    assert table.find_element("xpath", "preceding-sibling::p").text.startswith("scroll sideways")
