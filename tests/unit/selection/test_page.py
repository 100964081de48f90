"""The page of a selection in a real browser, with names and texts that would do harm if they were HTML."""

import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.browser import Browser, Page
from tests.selection_pools import pool
from torchtune_agent.selection import Options, Selection, select
from torchtune_agent.selection.page import plane, render

EVIL = "</script><img src=x onerror=\"throw 'owned'\"><b>bold</b> \u202e\x1b[31m\nnext"


def selection(number: int = 600, **changes: Any) -> Selection:
    own = pool(0, number, 9)
    assert own.embeddings is not None and own.tools is not None
    vectors = own.embeddings.copy()
    vectors[: number // 3] += 5
    vectors[5::7] = vectors[4:-1:7]
    own = replace(own, embeddings=vectors, ids=[f"{EVIL}:{i}" for i in range(number)], **changes)
    return select(own, Options("hybrid", "20%", dedup_distance=0.05, loss_cap_quantile=0.97, min_per_tool=2))


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "selection.html"
    path.write_text(render(selection(), lambda row: f"{EVIL} {row}"), encoding="utf-8")
    return path


def assert_sound(page: Page) -> None:
    assert page.errors == [] and page.requests == []
    assert page.js("document.images.length + document.querySelectorAll('b b, pre b').length") == 0
    assert page.js("document.documentElement.scrollWidth <= innerWidth")


def inked(page: Page) -> int:
    """How many pixels of the map are drawn."""
    return page.js(
        "(c => { const o = new OffscreenCanvas(c.width, c.height).getContext('2d', {willReadFrequently: true}); "
        "o.drawImage(c, 0, 0); "
        "return o.getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 == 3 && v).length; })"
        "(document.querySelector('canvas'))"
    )


def test_map_bars_and_examples_are_there(browser: Browser, page_path: Path) -> None:
    with browser.open(page_path) as page:
        text = page.js("document.querySelector('main').textContent")
        facts = page.js("document.querySelector('#facts').textContent")
        assert "120 of 600 samples (20.0%)" in facts and "Near-duplicates85" in facts
        for part in (
            "Tokens per sample",
            "Tools",
            "Sources",
            "Reasons",
            "None is lost",
            "Kept: the first picks",
            "near-dup",
        ):
            assert part in text
        assert page.js("document.querySelectorAll('details').length") > 40
        whole = inked(page)
        page.click("#legend button")
        assert 0 < inked(page) < whole
        page.click("#legend button")
        assert inked(page) == whole > 1000
        page.click("summary")
        assert page.js("document.querySelector('details[open] pre').textContent").startswith("</script><img")
        assert r"\u202e\x1b[31m" in page.js("document.querySelector('details[open] pre').textContent")
        assert_sound(page)


def test_a_finger_on_a_phone_in_the_dark_finds_a_sample(browser: Browser, page_path: Path) -> None:
    with browser.open(page_path, width=360, height=740, dark=True, touch=True) as page:
        assert inked(page) > 1000
        nearest = "data.points.map(p => place(p)).map(([x, y]) => [x / canvas.clientWidth, y / canvas.clientHeight])[0]"
        x, y = page.js(nearest)
        page.tap("#canvas", x, y)
        assert re.search(
            r": (kept|dropped|duplicate|suspected label error), \d+ tokens", page.js("at('point').textContent")
        )
        assert_sound(page)


def test_without_embeddings_there_is_no_map(browser: Browser, tmp_path: Path) -> None:
    own = replace(pool(), embeddings=None, tools=None, sources=None)
    path = tmp_path / "page.html"
    path.write_text(render(select(own, Options("loss_topk", 10))), encoding="utf-8")
    with browser.open(path) as page:
        assert page.js("document.querySelector('#map').hidden")
        assert page.js("document.querySelectorAll('.bars').length") == 2
        assert_sound(page)


def test_the_plane_is_that_of_the_largest_spread() -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((400, 12)) * np.array([9, 4, *[0.1] * 10]) + np.array([0, 0, 60, *[0] * 9])
    found = plane(base.astype(np.float32))
    assert abs(np.corrcoef(found[:, 0], base[:, 0])[0, 1]) > 0.99
    assert abs(np.corrcoef(found[:, 1], base[:, 1])[0, 1]) > 0.99
    assert np.abs(found).max(0) == pytest.approx([1, 1])


def test_the_page_stays_small_and_its_script_writes_text_only() -> None:
    own = selection(20_000)
    assert len(render(own, lambda row: "long " * 9000).encode()) < 2_000_000
    page = (files("torchtune_agent.selection") / "page.html").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|DOMParser|eval|https?:|src=|href=", page)
