"""The page in a real browser: Chromium, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from tests.web.conftest import SMALL, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, Locator, Page

    Open = Callable[..., Page]

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra test)")
LAPTOP, PHONE = {"width": 1280, "height": 720}, {"width": 390, "height": 844}
TABLET = {"width": 1024, "height": 768}
PATIENCE_MS = 240_000  # the first answer of a checkout compiles
LARGE = "model=mhc-27b&microbatches=184"  # 207,080 ops


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        # root has no sandbox; software rendering as on a machine without a screen
        launched = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser: Browser, server: str) -> Iterator[Open]:
    """Opens a query in a window of its own; at the end nothing went wrong or went outside."""
    wrong: list[str] = []
    contexts: list[Any] = []

    def open_(query: str = SMALL, **options: Any) -> Page:  # noqa: ANN401
        context = browser.new_context(**{"viewport": LAPTOP, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: said.type == "error" and wrong.append(said.text))
        page.on("request", lambda asked: _own(asked.url, server) or wrong.append(asked.url))
        page.goto(f"{server}/?{query}")
        settled(page)
        return page

    yield open_
    for context in contexts:
        context.close()
    # a refusal is an answer, though the console lists it
    assert [text for text in wrong if "422" not in text] == []


def _own(url: str, server: str) -> bool:
    return url.startswith((server, "data:", "blob:"))


def settled(page: Page) -> None:
    """Wait until answer, timeline and certainty are of what the address says."""
    page.wait_for_function(
        "() => document.documentElement.dataset.ready && !document.querySelector('[data-stale]')"
        " && window.mhcplan.together.plan?.query === window.mhcplan.state.plan"
        " && document.getElementById('certainty').dataset.known === 'true'"
    )


def fact(page: Page, label: str, part: str = "value") -> str:
    return page.locator(f"[data-fact='{label}'] .{part}").inner_text()


def number(text: str) -> float:
    return float(text.split()[0].replace(",", ""))


def drag(page: Page, slider: Locator, begin: float, end: float) -> None:
    """Drag a slider's thumb between two shares of its track, in steps as a hand does."""
    box = slider.bounding_box()
    assert box is not None
    thumb = 8  # its middle at either end
    x, width = box["x"] + thumb, box["width"] - 2 * thumb
    y = box["y"] + box["height"] / 2
    page.mouse.move(x + begin * width, y)
    page.mouse.down()
    for step in range(1, 13):
        page.mouse.move(x + (begin + (end - begin) * step / 12) * width, y)
        page.wait_for_timeout(20)
    page.mouse.up()


# -- the what-if -----------------------------------------------------------------------------------


def test_dragging_n_moves_overhead_and_memory_and_is_one_step_back(open_page: Open) -> None:
    page = open_page(f"{SMALL}&n=1&recompute_block=none")
    slider = page.get_by_label("n, expansion rate, slider")
    before = number(fact(page, "overhead")), number(fact(page, "memory of a GPU"))
    assert before[0] == 0
    drag(page, slider, 0, 0.75)  # 1, 2, 4, 8 of 1, 2, 4, 8, 16
    settled(page)
    assert "n=8" in page.url
    after = number(fact(page, "overhead")), number(fact(page, "memory of a GPU"))
    assert after[0] > before[0] + 1
    assert after[1] > before[1]
    assert page.get_by_label("n, expansion rate", exact=True).input_value() == "8"
    page.go_back()
    settled(page)
    assert "n=1" in page.url
    assert number(fact(page, "overhead")) == 0
    page.go_forward()
    settled(page)
    assert number(fact(page, "overhead")) == after[0]
    page.locator("#spoken", has_text="mHC n=8").wait_for(state="attached")


def test_the_timeline_follows_a_slider_when_it_is_let_go(open_page: Open) -> None:
    page = open_page(f"{SMALL}&n=1")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    box = page.get_by_label("n, expansion rate, slider").bounding_box()
    assert box is not None
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 8, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, y)
    with page.expect_response(lambda response: "/api/answer" in response.url):
        page.mouse.move(box["x"] + 8 + 0.75 * (box["width"] - 16), y)
    page.wait_for_timeout(800)  # longer than it rests otherwise
    assert not [url for url in asked if "/api/timeline" in url]
    page.mouse.up()
    settled(page)
    assert [url for url in asked if "/api/timeline" in url and "n=8" in url]


def test_a_shared_link_reproduces_the_page(open_page: Open) -> None:
    page = open_page(SMALL)
    page.get_by_label("schedule").select_option("1f1b")
    page.locator("summary", has_text="Any other field").click()
    page.get_by_label("field to add").select_option("layout.gpus_per_node")
    added = page.get_by_label("layout.gpus_per_node")
    added.fill("4")
    added.press("Enter")
    page.get_by_role("button", name="Pin as A").click()
    page.get_by_label("n, expansion rate", exact=True).fill("2")
    settled(page)
    facts = page.locator("#facts").inner_text()
    other = open_page(page.url.partition("?")[2])
    assert other.locator("#facts").inner_text() == facts
    assert other.get_by_label("layout.gpus_per_node").input_value() == "4"
    assert other.locator("#command").inner_text() == page.locator("#command").inner_text()


def test_two_plans_stand_side_by_side_and_their_timelines_move_together(open_page: Open) -> None:
    page = open_page(SMALL)
    page.get_by_role("button", name="Pin as A").click()
    page.get_by_label("n, expansion rate", exact=True).fill("8")
    settled(page)
    page.wait_for_function("() => window.mhcplan.together.drawn.timelines.length === 2")
    a, b = number(fact(page, "step", "change").removeprefix("A ")), number(fact(page, "step"))
    assert b > a
    assert "residual.expansion_rate" in page.locator("#difference").inner_text()
    assert page.locator("#timeline-a").is_visible()
    assert page.locator("#memory-table p").inner_text() == "margin, NCCL and context A in all"
    assert page.locator("#name-b").inner_text() == "B: mhc-3b --pp 2 --microbatches 4 --n 8"
    page.locator("#timeline").focus()
    page.keyboard.press("w")
    ranges = page.evaluate("() => window.mhcplan.together.drawn.timelines.map((t) => t.range)")
    assert ranges[0] == ranges[1]
    assert 0 < ranges[0][0] < ranges[0][1] < b * 1e6
    page.get_by_role("button", name="Swap").click()
    settled(page)
    assert number(fact(page, "step")) == a
    page.get_by_role("button", name="Unpin").click()
    settled(page)
    assert not page.locator("#timeline-a").is_visible()
    assert fact(page, "step") == f"{a:,.2f} ms"
    assert page.evaluate("() => document.activeElement.id") == "pin"


def test_what_is_wrong_stands_beside_its_field(open_page: Open) -> None:
    page = open_page(SMALL)
    field = page.get_by_label("pipeline ranks, pp", exact=True)
    field.fill("3")
    problem = page.locator("[data-name='pp'] .problem")
    problem.wait_for(state="visible")
    assert "must be even for dualpipe" in problem.inner_text()
    assert field.get_attribute("aria-invalid") == "true"
    field.fill("2")
    problem.wait_for(state="hidden")
    settled(page)


def test_a_typed_value_moves_the_slider_and_an_emptied_field_shows_its_default(
    open_page: Open,
) -> None:
    page = open_page(SMALL)
    field = page.get_by_label("n, expansion rate", exact=True)
    slider = page.get_by_label("n, expansion rate, slider")
    field.fill(" 8 ")
    assert slider.input_value() == "3"
    assert slider.get_attribute("aria-valuetext") == "8"
    settled(page)
    assert page.url.endswith("n=8")
    field.fill("")
    assert slider.get_attribute("aria-valuetext") == "4"
    field.press("Tab")
    assert field.input_value() == "4"


def test_what_is_typed_on_the_way_to_a_value_is_not_refused(open_page: Open) -> None:
    page = open_page(SMALL)
    page.evaluate(
        """() => {
          window.refusals = 0;
          const note = ([{ target }]) => { window.refusals += target.hidden ? 0 : 1; };
          for (const problem of document.querySelectorAll('.problem')) {
            new MutationObserver(note).observe(problem, { attributeFilter: ['hidden'] });
          }
        }"""
    )
    field = page.get_by_label("microbatches, M", exact=True)
    field.select_text()
    with page.expect_response(lambda response: response.status == 422):  # 1 is odd
        page.keyboard.type("16", delay=100)
    settled(page)
    assert page.url.endswith("microbatches=16")
    assert page.evaluate("() => window.refusals") == 0


def test_an_added_field_says_what_it_means(open_page: Open) -> None:
    page = open_page(f"{SMALL}&comm_ctas=4")
    field = page.get_by_label("comm_ctas")
    help_ = page.locator(f"#{str(field.get_attribute('aria-describedby')).split()[-1]}")
    assert help_.is_visible()
    assert help_.inner_text().startswith("SMs that a communication kernel takes at most")


def test_a_link_whose_pinned_plan_is_refused_can_be_unpinned(browser: Browser, server: str) -> None:
    page = browser.new_page(viewport=LAPTOP)
    page.set_default_timeout(PATIENCE_MS)
    page.goto(f"{server}/?{SMALL}&a=n%3D3")
    page.get_by_role("alert").filter(has_text="A, the pinned plan: ").wait_for()
    page.get_by_role("button", name="Unpin").click()
    settled(page)
    assert number(fact(page, "step")) > 0
    page.close()


def test_nothing_can_be_done_with_an_answer_that_is_not_there(open_page: Open) -> None:
    page = open_page(SMALL)
    needs = page.locator("[data-needs-answer]:visible")
    assert needs.count() == 5
    page.get_by_label("n, expansion rate", exact=True).fill("3")
    page.locator("[data-name='n'] .problem").wait_for()
    assert [button.is_enabled() for button in needs.all()] == [False] * 5
    page.locator("#downloads").get_by_text("Download").click(force=True)
    assert page.get_by_role("button", name="plan (TOML)").is_hidden()
    assert page.locator("#facts .value").count() > 0  # the last answer stays in sight
    page.reload()
    page.get_by_role("alert").filter(has_text="residual.expansion_rate=3 must be").wait_for()
    assert page.get_by_role("heading", name="Timeline").is_hidden()
    assert [button.is_enabled() for button in needs.all()] == [False] * needs.count()
    page.get_by_label("n, expansion rate", exact=True).fill("2")
    settled(page)
    assert page.get_by_role("heading", name="Timeline").is_visible()
    assert [button.is_enabled() for button in needs.all()] == [True] * 5


def test_sliders_at_their_ends_are_answered_or_refused(open_page: Open) -> None:
    page = open_page(SMALL)
    for name in ("n, expansion rate", "pipeline ranks, pp", "tokens in a sequence"):
        for key in ("End", "Home"):
            page.get_by_label(f"{name}, slider").press(key)
            page.wait_for_function(
                "() => !document.querySelector('[data-stale]')"
                " || document.querySelector('.problem:not([hidden])')"
            )
            assert page.locator("#facts .value").count() > 0


def test_stopped_server_is_said_and_found_again(browser: Browser) -> None:
    with serving("--port", "0") as address:
        page = browser.new_page(viewport=LAPTOP)
        page.set_default_timeout(PATIENCE_MS)
        page.goto(f"{address}/?{SMALL}")
        settled(page)
        facts = page.locator("#facts").inner_text()
    page.get_by_label("n, expansion rate", exact=True).fill("2")
    page.get_by_role("alert").filter(has_text="does not answer").wait_for()
    assert page.locator("#facts").inner_text() == facts  # what was there stays
    with serving("--port", address.rpartition(":")[2]):
        settled(page)
        assert page.locator("#facts").inner_text() != facts
    page.close()


def test_a_timeline_that_a_stopped_server_owes_comes_later(browser: Browser, server: str) -> None:
    page = browser.new_page(viewport=LAPTOP)
    page.set_default_timeout(PATIENCE_MS)
    page.goto(f"{server}/?{SMALL}")
    settled(page)
    page.route("**/api/timeline*", lambda route: route.abort())
    page.get_by_label("n, expansion rate", exact=True).fill("2")
    page.get_by_role("alert").filter(has_text="does not answer").wait_for()
    page.unroute("**/api/timeline*")
    settled(page)
    assert page.get_by_role("alert").is_hidden()
    page.close()


# -- files -----------------------------------------------------------------------------------------


def test_downloaded_page_works_by_itself(open_page: Open, browser: Browser, tmp_path: Path) -> None:
    page = open_page(SMALL)
    page.locator("summary", has_text="Download").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="HTML page with the timeline").click()
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    alone = browser.new_page(viewport=LAPTOP, offline=True)
    alone.goto(file.as_uri())
    alone.wait_for_selector("html[data-ready=true]")
    assert alone.locator("#timeline .plot-container").count() == 1
    overlapping = alone.locator(".tables table").evaluate_all(
        "(tables) => tables.filter((t) => t.scrollWidth > t.parentElement.clientWidth).length"
    )
    assert overlapping == 0
    alone.set_viewport_size(PHONE)
    assert alone.evaluate("() => document.documentElement.scrollWidth") <= PHONE["width"]
    alone.close()


def test_what_a_button_did_is_said_and_moves_nothing(open_page: Open) -> None:
    page = open_page(SMALL)
    places = "() => [...document.querySelectorAll('#answer button')].map((b) => b.offsetLeft)"
    before = page.evaluate(places)
    page.get_by_role("button", name="Copy link").click()
    page.locator("#done", has_text="link").wait_for()
    assert page.evaluate(places) == before
    page.locator("summary", has_text="Download").click()
    page.get_by_role("button", name="megatron (zip)").click()
    page.locator("#done", has_text="megatron, which runs 1f1b").wait_for()
    assert page.evaluate(places) == before


def test_downloads_open_inside_the_window_and_escape_leads_back(open_page: Open) -> None:
    page = open_page(SMALL)
    summary = page.locator("#downloads summary")
    for viewport in (LAPTOP, TABLET, PHONE):
        page.set_viewport_size(viewport)
        summary.click()
        menu = page.locator("#downloads > div").bounding_box()
        assert menu is not None
        assert menu["x"] >= 0
        assert menu["x"] + menu["width"] <= viewport["width"]
        page.keyboard.press("Tab")
        page.keyboard.press("Escape")
        assert summary.evaluate("(element) => element === document.activeElement")
        assert page.get_by_role("button", name="plan (TOML)").is_hidden()


def test_a_plan_file_is_opened(open_page: Open, tmp_path: Path) -> None:
    page = open_page(f"{SMALL}&n=2&p2p=grouped")
    page.locator("summary", has_text="Download").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="plan (TOML)").click()
    file = tmp_path / "plan.toml"
    download.value.save_as(file)
    other = open_page(SMALL)
    other.locator("#plan-file").set_input_files(file)
    other.wait_for_function("() => location.search.includes('p2p=grouped')")
    settled(other)
    assert other.locator("#facts").inner_text() == page.locator("#facts").inner_text()


def test_sweep_is_drawn_and_a_click_goes_there(open_page: Open) -> None:
    page = open_page(SMALL)
    page.get_by_role("button", name="Sweep n").click()
    page.get_by_text("Sweep n: 5 of 5").wait_for()
    caption = page.locator("figcaption").inner_text()
    assert caption.startswith("Sweep n of mhc-3b --pp 2 --microbatches 4.")
    points = page.locator("[data-plot='n'] .scatterlayer .trace").first.locator(".point")
    assert points.count() >= 4
    points.nth(1).scroll_into_view_if_needed()
    box = points.nth(1).bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_function("() => location.search.includes('n=2')")
    settled(page)
    page.get_by_role("button", name="Time against memory").click()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("Time against memory: cancelled").wait_for()


# -- the timeline ----------------------------------------------------------------------------------

_COUNT_FRAMES = """() => {
  window.frames_ = [];
  const tick = (time) => { window.frames_.push(time); window.tick_ = requestAnimationFrame(tick); };
  requestAnimationFrame(tick);
}"""
_FRAMES = "() => { cancelAnimationFrame(window.tick_); return window.frames_; }"
_OPENED = "() => performance.getEntriesByName('timeline')[0].startTime / 1000"  # s since asked
_PIXELS = "(element) => element.querySelectorAll('.heatmaplayer image, .barlayer path').length"


def test_large_timeline_opens_pans_and_zooms_to_single_ops(
    open_page: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    page = open_page(LARGE)
    simulated_s = page.evaluate(_OPENED)
    page.reload()  # what it shows is at hand now: what is timed is the page
    settled(page)
    opened_s = page.evaluate(_OPENED)
    ops = page.evaluate("() => window.mhcplan.together.plan.timeline.ops.start.length")
    assert ops > 150_000
    plot = page.locator("#timeline")
    plot.evaluate("(element) => element.scrollIntoView({ block: 'center' })")
    assert plot.evaluate(_PIXELS) > 0
    page.evaluate("() => { const t = window.mhcplan.together.plan.timeline;"
                  " return t.show(t.whole * 0.3, t.whole * 0.5); }")  # fmt: skip
    rates = [_pan(page, plot) for _ in range(2)]
    begin, _ = page.evaluate("() => window.mhcplan.together.plan.timeline.range")
    assert begin != page.evaluate("() => window.mhcplan.together.plan.timeline.whole * 0.3")
    for _ in range(12):
        page.keyboard.press("w")
        page.wait_for_timeout(30)
    assert page.evaluate("() => window.mhcplan.together.plan.timeline.isRaster") is False
    assert plot.locator(".barlayer path").count() > 0
    with capsys.disabled():
        panned = " and ".join(f"{rate:.0f}" for rate in rates)
        print(f"\n{ops:,} ops: on the page after {simulated_s:.2f} s, simulated before"
              f" {opened_s:.2f} s; panned at {panned} frames/s")  # fmt: skip
    assert min(rates) > 1  # frames are drawn; how many depends on what else the machine does


def _pan(page: Page, plot: Locator) -> float:
    """Drag the timeline to and fro; frames a second."""
    box = plot.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.evaluate(_COUNT_FRAMES)
    for step in range(40):
        page.mouse.move(x - 8 * min(step, 40 - step) - 4 * step, y)
    page.mouse.up()
    frames = page.evaluate(_FRAMES)
    return 1000 * (len(frames) - 1) / (frames[-1] - frames[0])


def test_hover_says_what_an_op_is_and_why_it_waited(open_page: Open) -> None:
    page = open_page(SMALL)
    plot = page.locator("#timeline")
    plot.evaluate("(element) => element.scrollIntoView({ block: 'end' })")
    box = plot.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 40)
    page.mouse.move(box["x"] + box["width"] / 2 + 3, box["y"] + 42)
    tip = page.locator(".tip:visible")
    tip.wait_for()
    said = tip.inner_text()
    assert "rank 0 compute" in said
    assert "waited" in said or "started with the step" in said
    page.keyboard.press("c")
    pressed = page.get_by_role("button", name="critical path")
    assert pressed.get_attribute("aria-pressed") == "true"


def test_the_wheel_scrolls_the_page_and_zooms_the_timeline_with_ctrl(open_page: Open) -> None:
    page = open_page(SMALL)
    plot = page.locator("#timeline")
    plot.evaluate("(element) => element.scrollIntoView({ block: 'center' })")
    before = page.evaluate("() => window.scrollY")
    box = plot.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.wheel(0, 100)
    page.wait_for_function("(before) => window.scrollY > before", arg=before)
    assert page.evaluate("() => window.mhcplan.together.plan.timeline.range[0]") == 0
    scrolled = page.evaluate("() => window.scrollY")
    page.keyboard.down("Control")
    page.mouse.wheel(0, -100)
    page.keyboard.up("Control")
    page.wait_for_function("() => window.mhcplan.together.plan.timeline.range[0] > 0")
    assert page.evaluate("() => window.scrollY") == scrolled


# -- for everyone ----------------------------------------------------------------------------------


def test_keyboard_reaches_everything_and_every_input_has_a_name(open_page: Open) -> None:
    page = open_page(SMALL)
    slider = page.get_by_label("n, expansion rate, slider")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    settled(page)
    assert "n=2" in page.url
    nameless = page.evaluate(
        "() => [...document.querySelectorAll('input, select, button, summary')].filter((e) =>"
        " !(e.labels?.length || e.ariaLabel || e.textContent.trim())).map((e) => e.outerHTML)"
    )
    assert nameless == []
    page.locator("#inputs").get_by_label("model", exact=True).focus()
    page.keyboard.press("s")  # types in the picker, does not zoom
    assert page.evaluate("() => window.mhcplan.together.plan.timeline.range[0]") == 0


def test_theme_follows_the_system_until_one_is_chosen(open_page: Open) -> None:
    page = open_page(SMALL, color_scheme="dark")
    ground = "() => getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.get_by_role("button", name="dark or light").click()
    light = page.evaluate(ground)
    assert dark != light
    page.reload()
    settled(page)
    assert page.evaluate(ground) == light


def test_page_fits_its_window(open_page: Open) -> None:
    page = open_page(f"{SMALL}&n=2&a=model%3Dmhc-3b%26pp%3D2%26microbatches%3D4")
    for viewport in (LAPTOP, TABLET, PHONE):
        page.set_viewport_size(viewport)
        settled(page)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= viewport["width"]
        answer = page.locator("#facts").bounding_box()
        assert answer is not None
        assert answer["y"] + answer["height"] < viewport["height"] / 2
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            _keep(page, f"{viewport['width']}-{scheme}")


def test_a_new_answer_moves_nothing(open_page: Open) -> None:
    page = open_page(SMALL)
    places = """() => ['field-n', 'pin', 'breakdown', 'memory-table'].map(
      (id) => document.getElementById(id).getBoundingClientRect().top)"""
    for viewport, key in ((LAPTOP, "ArrowLeft"), (TABLET, "ArrowRight"), (PHONE, "ArrowLeft")):
        page.set_viewport_size(viewport)
        page.wait_for_timeout(300)  # plots take their new widths
        before = page.evaluate(places)
        with page.expect_response(lambda response: "/api/certainty" in response.url):
            page.get_by_label("n, expansion rate, slider").press(key)
            page.wait_for_function("() => document.querySelector('[data-known=false]')")
            assert page.evaluate(places) == before
        settled(page)
        assert page.evaluate(places) == before


def test_a_finger_scrolls_the_page_over_every_figure(open_page: Open) -> None:
    page = open_page(SMALL, viewport=PHONE, has_touch=True, is_mobile=True)
    touch = page.context.new_cdp_session(page)
    for name in ("breakdown", "memory", "timeline"):
        plot = page.locator(f"#{name}")
        plot.evaluate("(element) => element.scrollIntoView({ block: 'center' })")
        page.wait_for_timeout(100)
        before = page.evaluate("() => window.scrollY")
        box = plot.bounding_box()
        assert box is not None
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        for kind, moved in (("touchStart", 0), *(("touchMove", 10 * n) for n in range(1, 9))):
            points = [{"x": x, "y": y - moved}]
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        page.wait_for_function("(before) => window.scrollY > before", arg=before)


def test_no_figure_of_a_long_step_is_cut_off(open_page: Open) -> None:
    page = open_page("model=mhc-27b&micro_batch_size=4")
    assert number(fact(page, "step")) > 10_000  # ms
    for viewport in (LAPTOP, TABLET):
        page.set_viewport_size(viewport)
        for name in ("breakdown", "memory"):
            table = page.locator(f"#{name}-table > div")
            assert table.evaluate("(box) => box.scrollWidth - box.clientWidth") == 0
    for width in (1301, 1001, 821, 721, 320):  # where the layout is about to change
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_function("() => document.documentElement.scrollWidth <= innerWidth")


def _keep(page: Page, name: str) -> None:
    """A picture to be looked at, where the environment names a folder for it."""
    folder = os.environ.get("MHCPLAN_SCREENSHOTS")
    if folder:
        page.wait_for_timeout(500)
        page.screenshot(path=f"{folder}/{name}.png")
        page.screenshot(path=f"{folder}/{name}-all.png", full_page=True)
