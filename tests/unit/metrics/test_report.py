"""The report in a real browser: what is drawn, what the mouse, a finger and the keyboard do, and what it never does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import logged_run
from tests.browser import Browser, Page
from torchtune_agent.metrics.history import History
from torchtune_agent.metrics.names import metric_name
from torchtune_agent.metrics.report import render, write_report

REPOSITORY = Path(__file__).parents[3]
LOSS = 'figure[data-metric="nll"]'
CLASSES = [*logged_run.GROUPS]
INJECTION = '</script><script>document.title = "broken in"</script><img src=x onerror=\'document.title = "broken in"\'>'


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of forty steps: class metrics every second, validation every tenth."""
    logs = tmp_path_factory.mktemp("run") / "a run" / "logs"
    path = logged_run.write(logs, logged_run.rows(40, every=2))
    (logs / "config.yaml").write_text("dataset:\n  data_files: my.jsonl\n")
    return write_report(logs, History.read(path))


def lines(page: Page, figure: str = LOSS) -> list[list[str]]:
    """Class, split and path of every curve in a chart."""
    curves = f"document.querySelectorAll('{figure} path.line')"
    return page.js(f"[...{curves}].map(e => [e.dataset.class, e.dataset.split, e.getAttribute('d')])")


def tip(page: Page) -> list[str]:
    """The lines of the tooltip."""
    if page.js("document.getElementById('tip').hidden"):
        return []
    return page.js("document.getElementById('tip').innerText").split("\n")


def drawn(page: Page) -> None:
    """Wait until what was asked for is on the screen."""
    page.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def domain(page: Page) -> list[float]:
    return page.js("charts[0].domain")


def test_every_curve_is_drawn_in_its_colour(browser: Browser, report: Path) -> None:
    with browser.open(report) as page:
        assert [line[:2] for line in lines(page)] == [[c, split] for split in ("train", "val") for c in CLASSES]
        for _, split, d in lines(page):
            assert d.count("M") == 1 and d.count("L") == {"train": 20, "val": 3}[split]
        for name in ("accuracy", "exact_entropy", "perplexity", "top1_prob"):
            assert len(lines(page, f'figure[data-metric="{name}"]')) == 2 * len(CLASSES)
        for name in ("lr", "grad_norm", "tokens_per_second_per_gpu"):
            assert len(lines(page, f'figure[data-metric="{name}"]')) == 1
        assert len(lines(page, 'figure[data-metric="loss"]')) == 2
        stroke = page.js(f"getComputedStyle(document.querySelector('{LOSS} .k-arg_value.line')).stroke")
        assert stroke == "rgb(170, 53, 37)"
        page.click("#more summary")
        drawn(page)
        assert len(lines(page, 'figure[data-metric="top10_prob"]')) == 2 * len(CLASSES)
        assert page.errors == [] and page.requests == []


def test_curves_are_where_their_values_are(browser: Browser, report: Path) -> None:
    """Heights above the foot of the chart have the ratio of the values: the axis is linear and starts at 0."""
    with browser.open(report) as page:
        (d,) = [d for group, split, d in lines(page) if (group, split) == ("arg_value", "train")]
        heights = [float(point.split()[1]) for point in d.replace("M", "L").split("L")[1:]]
        zero = page.js("charts[0].py(0)")
        assert page.js("charts[0].range[0]") == 0
    curve = History(logged_run.rows(40, every=2)).curves["train_arg_value_nll"]
    assert len(heights) == len(curve)
    for height, value in zip(heights, curve.values, strict=True):
        assert (zero - height) / (zero - heights[0]) == pytest.approx(value / curve.values[0], abs=0.002)


def test_hovering_shows_every_value_at_the_step(browser: Browser, report: Path) -> None:
    history = History(logged_run.rows(40, every=2))
    with browser.open(report) as page:
        assert tip(page) == []
        page.hover(f"{LOSS} svg", page.js("(46 + charts[0].px(20)) / charts[0].svg.clientWidth"), 0.5)
        heading, _, *shown = tip(page)
        assert heading == "step 20"
        assert len(shown) == len(CLASSES)
        for group, line in zip(CLASSES, shown, strict=True):
            curves = [history.curves[metric_name(split, group, "nll")] for split in ("train", "val")]
            expected = [curve.values[list(curve.steps).index(20)] for curve in curves]
            assert [float(cell) for cell in line.split("\t")[1:]] == pytest.approx(expected, rel=1e-3)
        assert page.js("document.querySelectorAll('main > .charts .cross').length") == 9  # the step, in every chart
        page.hover("h1")
        assert tip(page) == []
        assert page.errors == []


def test_a_value_of_another_step_is_shown_with_it(browser: Browser, report: Path) -> None:
    with browser.open(report) as page:
        page.hover(f"{LOSS} svg", page.js("(46 + charts[0].px(24)) / charts[0].svg.clientWidth"), 0.5)
        assert tip(page)[0] == "step 24" and tip(page)[2].endswith(" at 20")


def test_classes_and_splits_can_be_hidden(browser: Browser, report: Path) -> None:
    with browser.open(report) as page:
        page.click('.chip[data-id="reasoning"]')
        drawn(page)
        left = [c for c in CLASSES if c != "reasoning"]
        assert [line[:2] for line in lines(page)] == [[c, split] for split in ("train", "val") for c in left]
        page.hover(f"{LOSS} svg")
        assert not [line for line in tip(page) if line.startswith("reasoning")]
        page.click('.chip[data-id="val"]')
        drawn(page)
        assert [line[:2] for line in lines(page)] == [[c, "train"] for c in left]
        page.click('.chip[data-id="arg_value"]', times=2)  # only this one
        drawn(page)
        assert [line[0] for line in lines(page)] == ["arg_value"]
        page.click('.chip[data-id="arg_value"]', times=2)
        page.click('.chip[data-id="val"]')
        drawn(page)
        assert len(lines(page)) == 2 * len(CLASSES)
        assert page.js("document.querySelectorAll('.chip[aria-pressed=\"false\"]').length") == 0
        assert page.errors == []


def test_dragging_zooms_every_chart_and_a_double_click_resets(browser: Browser, report: Path) -> None:
    with browser.open(report) as page:
        assert domain(page) == [1, 40] and page.js("document.getElementById('reset').hidden")
        page.drag('figure[data-metric="accuracy"] svg', (0.4, 0.5), (0.6, 0.6))
        drawn(page)
        low, high = domain(page)
        assert 10 < low < 20 < high < 30
        assert page.js("charts.every(chart => chart.width <= 0 || String(chart.domain) === String(charts[0].domain))")
        page.click(f"{LOSS} svg", times=2)
        drawn(page)
        assert domain(page) == [1, 40]
        page.drag(f"{LOSS} svg", (0.6, 0.5), (0.4, 0.5))  # from right to left
        drawn(page)
        page.click("#reset")
        drawn(page)
        assert domain(page) == [1, 40] and page.errors == []


def test_logarithm_and_smoothing_redraw(browser: Browser, report: Path) -> None:
    with browser.open(report) as page:
        plain = lines(page)
        page.click(f"{LOSS} .scale")
        logarithmic = lines(page)
        assert all(a[2] != b[2] for a, b in zip(plain, logarithmic, strict=True))
        assert page.js("charts[0].py(1) - charts[0].py(2)") == pytest.approx(
            page.js("charts[0].py(2) - charts[0].py(4)")
        )
        page.click(f"{LOSS} .scale")
        slider = "document.getElementById('smoothing')"
        page.js(f"({slider}.value = 0.9, {slider}.dispatchEvent(new Event('input')))")
        drawn(page)
        for before, after in zip(plain, lines(page), strict=True):
            assert (before[2] == after[2]) == (before[1] == "val")  # validation is never smoothed
        assert page.errors == []


def test_the_keyboard_moves_from_step_to_step(browser: Browser, report: Path) -> None:
    with browser.open(report) as page:
        page.js(f"document.querySelector('{LOSS} svg').focus()")
        for key, step in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowRight", 4), ("ArrowLeft", 2)):
            page.send("Input.dispatchKeyEvent", type="keyDown", key=key)
            assert tip(page)[0] == f"step {step}"
        page.send("Input.dispatchKeyEvent", type="keyDown", key="Escape")
        assert tip(page) == []


def test_on_a_phone_nothing_is_wider_than_the_screen(browser: Browser, report: Path) -> None:
    with browser.open(report, width=360, height=740, touch=True) as page:
        page.click("#more summary")
        page.click("#config summary")
        drawn(page)
        assert page.js("[document.documentElement.scrollWidth, innerWidth]") == [360, 360]
        page.tap(f"{LOSS} svg", 0.6)
        assert tip(page)[0].startswith("step ") and len(tip(page)) == 2 + len(CLASSES)
        left, top, width, height = page.js(
            "(r => [r.x, r.y, r.width, r.height])(document.getElementById('tip').getBoundingClientRect())"
        )
        assert left >= 0 and top >= 0 and left + width <= 360 and top + height <= 740
        page.tap("h2")
        assert tip(page) == [] and page.errors == []


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_in_light_and_dark(dark: bool, browser: Browser, report: Path) -> None:
    with browser.open(report, dark=dark) as page:
        style = "(e => { const s = getComputedStyle(e); return [s.color, s.backgroundColor]; })"
        for selector, behind in (("h1", "html"), ("#findings li", "#standing"), ("td.before, .table td", ".table")):
            ink = page.js(f"{style}(document.querySelector('{selector}'))")[0]
            ground = page.js(f"{style}(document.querySelector('{behind}'))")[1]
            brightness = [sum(map(float, colour[4:-1].split(","))) / 3 for colour in (ink, ground)]
            assert (brightness[0] > brightness[1]) == dark and abs(brightness[0] - brightness[1]) > 150
        assert page.errors == []


def test_what_is_not_finite_is_a_gap_with_a_mark(browser: Browser, tmp_path: Path) -> None:
    logged = list(logged_run.rows(20))
    for row in logged:
        if row["step"] in (8, 9) and "loss" in row:
            row["train_arg_value_nll"] = "nan"
            row["grad_norm"] = "inf"
    with browser.open(write_report(tmp_path, History.read(logged_run.write(tmp_path, logged)))) as page:
        pieces = {group: d.count("M") for group, split, d in lines(page) if split == "train"}
        assert pieces == {group: 2 if group == "arg_value" else 1 for group in CLASSES}
        marks = f"[...document.querySelectorAll('{LOSS} .mark title')].map(e => e.textContent)"
        assert page.js(marks) == [f"train_arg_value_nll is nan at step {step}" for step in (8, 9)]
        page.hover(f"{LOSS} svg", page.js("(46 + charts[0].px(8)) / charts[0].svg.clientWidth"), 0.5)
        assert [line for line in tip(page) if line.startswith("argument values\tnan")]
        assert "is not finite, first at step 8" in page.js("document.getElementById('findings').innerText")
        assert page.errors == []


def test_text_of_the_run_is_never_run(browser: Browser, tmp_path: Path) -> None:
    logged = [row | {f"train_{INJECTION}": 1.0, INJECTION: 2.0} for row in logged_run.rows(12)]
    path = tmp_path / "report.html"
    path.write_text(render(History(logged), INJECTION, f"data_files: {INJECTION}\n<!--\n"))
    with browser.open(path) as page:
        assert page.js("document.title") == f"{INJECTION}: training report"
        assert INJECTION in page.js("document.querySelector('#config pre').textContent")
        assert page.js("document.querySelectorAll('img').length") == 0
        assert len(lines(page)) == 2 * len(CLASSES)
        assert page.errors == [] and page.requests == []


def test_a_hundred_thousand_rows_stay_below_two_megabytes(browser: Browser, tmp_path: Path) -> None:
    history = History(logged_run.rows(100_000, every=50, val_every=1000))
    path = tmp_path / "report.html"
    path.write_text(render(history, "long"), encoding="utf-8")
    assert path.stat().st_size < 2_000_000
    with browser.open(path) as page:
        assert [line[:2] for line in lines(page)] == [[c, split] for split in ("train", "val") for c in CLASSES]
        assert "The longest curve has 100,000 points" in page.js("document.getElementById('thinned').textContent")
        page.hover(f"{LOSS} svg")
        assert "mean, least–greatest" in tip(page)[0]
        assert page.errors == []


@pytest.mark.parametrize("num_rows", [0, 1])
def test_a_run_that_has_hardly_begun_has_a_report(num_rows: int, browser: Browser, tmp_path: Path) -> None:
    history = History(list(logged_run.rows(10))[:num_rows])
    path = tmp_path / "report.html"
    path.write_text(render(history, "young"))
    with browser.open(path) as page:
        assert len(lines(page)) == num_rows * len(CLASSES)
        assert page.js(f"document.querySelectorAll('{LOSS} path.dots').length") == num_rows * len(CLASSES)
        assert page.errors == []


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`python -m torchtune_agent report` in a process that may not import torch."""
    code = "import sys, runpy; sys.modules['torch'] = None; runpy.run_module('torchtune_agent', run_name='__main__')"
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, "-c", code, "report", *arguments], env=env, capture_output=True, text=True)


def test_the_command_makes_the_report_without_torch_while_the_run_goes_on(tmp_path: Path) -> None:
    path = logged_run.write(tmp_path / "out" / "logs", logged_run.rows(10))
    with path.open("a") as file:
        file.write('{"step": 11, "lo')
    result = command(tmp_path / "out")
    made = tmp_path / "out" / "logs" / "report.html"
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{made}\n", "")
    assert '"title":"out"' in made.read_text()


def test_the_command_names_what_is_missing(tmp_path: Path) -> None:
    result = command(tmp_path)
    assert result.returncode == 1
    missing = tmp_path / "logs" / "metrics.jsonl"
    assert (
        result.stderr == f"error: {missing}: cannot be read: No such file or directory. Name the output_dir of a run.\n"
    )
