"""The page of `agent_data_check` in a real browser, with data that would do harm if it were HTML."""

import json
import re
from collections import Counter
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.browser import Browser, Page
from torchtune_agent.data import AgentSFTDataset, TokenClass, toolworld_tokenizer
from torchtune_agent.data.inspection import CheckedData, Chosen, Parity, TaggedTokens, informative, statistics
from torchtune_agent.data.inspection import write_page as write
from torchtune_agent.data.inspection.looks import LOOKS
from torchtune_agent.data.inspection.page import embedded
from torchtune_agent.data.inspection.parity import Divergence
from torchtune_agent.data.quarantine import LeftOut
from torchtune_agent.data.token_text import Vocabulary, vocabulary
from torchtune_agent.toolworld import ToolWorld

EVIL = "</script><img src=x onerror=\"throw 'owned'\"><b>bold</b> \u202e\x1b[31m <!-- {{1}} \u2028"
CALL = f"<function=add>\n<parameter=a>\n{EVIL}東京\n</parameter>\n</function>"
RECORD = {
    "messages": [
        {"role": "user", "content": EVIL},
        {"role": "assistant", "content": f"{EVIL}{CALL}{CALL}"},
        {"role": "tool", "content": EVIL},
        {"role": "tool", "content": EVIL},
        {"role": "assistant", "content": "It is 42."},
    ]
}


@cache
def tokenizer() -> Any:
    return toolworld_tokenizer(640)


def checked(source: list[dict[str, Any]], key: str = "dataset", **options: Any) -> CheckedData:
    data = AgentSFTDataset(tokenizer(), source=source, **options)
    samples = [TaggedTokens.of(data[i], {2}) for i in range(len(data))]
    counts = statistics(samples, vocabulary(tokenizer()), {2})
    data.report.left_out += [LeftOut(f"data{i}.jsonl:{i}{EVIL}", "broken_json", EVIL, EVIL) for i in range(300)]
    return CheckedData(
        key=key,
        report=data.report,
        has_token_classes=True,
        limits=(640,),
        stop_ids=frozenset({2}),
        statistics=counts,
        parity=Parity(version="5", divergences=[Divergence(EVIL, 3, EVIL, EVIL, EVIL)]),
        datasets={"dataset": len(samples)},
        sources=Counter({EVIL: 3, "web": 2}),
        samples=[Chosen(i, why, f"d.jsonl:{i + 1}", samples[i]) for i, why in informative(counts, 50, ()).items()],
        refusal=f"data.jsonl:1: {EVIL}",
    )


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page about hostile data, with a second part about ToolWorld's."""
    path = tmp_path_factory.mktemp("page") / "data_check.html"
    parts = [
        checked([RECORD], class_weights={"arg_value": 2.0}),
        checked(ToolWorld(num_tools=40).conversations("train", 30), "dataset_val"),
    ]
    write(path, parts, vocabulary(tokenizer()), EVIL)
    return path


def embedded_data(path: Path) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.S)
    return json.loads(text)


def fields(page: Page) -> dict[str, str]:
    """What the page says of the token that was chosen last."""
    return page.js(
        "Object.fromEntries([...document.querySelectorAll('[data-field]')].map(e => [e.dataset.field, e.textContent]))"
    )


def assert_sound(page: Page) -> None:
    assert page.errors == [] and page.requests == []
    assert page.js("document.images.length + document.querySelectorAll('main b b').length") == 0
    assert page.js("document.documentElement.scrollWidth <= innerWidth")


def test_hovering_says_what_becomes_of_every_token(browser: Browser, page_path: Path) -> None:
    known = vocabulary(tokenizer())
    data = AgentSFTDataset(tokenizer(), source=[RECORD], class_weights={"arg_value": 2.0})
    sample, texts = data[0], [known.text_of(int(i)) for i in data[0]["tokens"]]
    classes = sample["token_class"].tolist()
    with browser.open(page_path) as page:
        assert page.js("document.querySelectorAll('#tokens span').length") == len(classes)
        for kind in ("CALL_NAME", "ARG_VALUE", "SPECIAL", "REASONING", "IGNORED"):
            p = len(classes) - 1 - classes[::-1].index(TokenClass[kind])  # the last one
            page.hover(f"[data-p='{p}']")
            found = fields(page)
            assert found["id"] == str(sample["tokens"][p]) and found["position"] == str(p)
            assert found["class"].strip() == LOOKS[TokenClass[kind]].title
            assert found["call"] == ("1, add" if "CALL" in kind or "ARG" in kind else "none")
            assert found["weight"] == {"ARG_VALUE": "2", "IGNORED": "0"}.get(kind, "1")
            assert found["target"].startswith("no" if kind == "IGNORED" else "yes: the model learns to write it after")
            trains = p + 1 < len(classes) and classes[p + 1]
            assert found["label"].startswith(f"here: {sample['tokens'][p + 1]} " if trains else "here: -100")
            if texts[p].decode("utf-8", "ignore").isprintable():
                assert found["text"].startswith(texts[p].decode("utf-8", "ignore"))
        assert_sound(page)


def test_text_is_shown_as_it_is_and_what_cannot_be_seen_as_escapes(browser: Browser, page_path: Path) -> None:
    with browser.open(page_path) as page:
        shown = page.js("document.querySelector('#tokens').textContent").replace("◦", "")  # parts of characters
        assert EVIL[:51] in shown and "東" in shown and r"\u{202e}\u{1b}[31m <!-- {{1}} \u{2028}" in shown
        assert not re.search("[\u202e\x1b\u2028]", page.js("document.querySelector('main').textContent"))
        assert "Training stops here" in page.js("document.querySelector('.refusal').textContent")
        assert page.js("document.querySelectorAll('main table tr').length") > 200  # the quarantine's first rows
        assert "first 200 of 300" in page.js("document.querySelector('main').textContent")
        assert_sound(page)


def test_legend_samples_and_parts_can_be_chosen(browser: Browser, page_path: Path) -> None:
    ground = "getComputedStyle(document.querySelector('#tokens .k7')).backgroundColor"
    with browser.open(page_path, dark=True) as page:
        coloured = page.js(ground)
        page.click("#legend .k7")
        assert page.js(ground) == "rgba(0, 0, 0, 0)" != coloured
        page.click("#legend .k7")
        assert page.js(ground) == coloured
        page.click("#parts button:nth-child(2)")
        titles = set()
        for number in (1, 2, 3):
            page.click(f"#list button:nth-child({number})")
            titles.add(page.js("document.querySelector('#title').textContent"))
        assert len(titles) == 3 and all(" of 30: " in title for title in titles)
        page.click("[data-p='40']")
        for key, position in (("ArrowRight", "41"), ("ArrowDown", "51"), ("ArrowLeft", "50")):
            page.js(f"document.querySelector('#tokens').dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}'}}))")
            assert fields(page)["position"] == position
        assert_sound(page)


def test_a_finger_on_a_phone_is_enough(browser: Browser, page_path: Path) -> None:
    with browser.open(page_path, width=360, height=740, touch=True) as page:
        page.tap("#tokens .k5")
        assert fields(page)["class"].strip() == "tool names"
        assert page.js("document.querySelector('#token').getBoundingClientRect().bottom <= innerHeight")
        assert_sound(page)


def test_json_cannot_end_its_element() -> None:
    data = {"</script><!--<script>": ["</SCRIPT>", "\u2028", "東京"]}
    assert "<" not in embedded(data) and json.loads(embedded(data)) == data


def test_the_script_writes_text_only() -> None:
    page = (files("torchtune_agent.data.inspection") / "page.html").read_text()
    assert "textContent" in page
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|DOMParser|eval|https?:|src=|href=", page)


def test_the_page_stays_small_whatever_the_data_is(tmp_path: Path) -> None:
    """A few samples of many thousand different tokens each, and as many tools and bad records as you like."""
    rng = np.random.default_rng(0)
    size = 25_000

    known = Vocabulary(lambda token: f"<{token:x}>".encode(), frozenset({2}), size)

    def sample() -> TaggedTokens:
        classes = rng.integers(0, 8, size)
        calls = np.where(classes >= TokenClass.CALL_SYNTAX, np.arange(size) // 100, -1)
        return TaggedTokens(rng.integers(0, 150_000, size), classes > 0, classes, calls, rng.random(size))  # all differ

    samples = [sample() for _ in range(20)]
    base = checked(ToolWorld(num_tools=40).conversations("train", 1))
    counts = statistics(samples[:1], known, {2})
    chosen = [Chosen(i, "first", f"d.jsonl:{i + 1}", tokens) for i, tokens in enumerate(samples)]
    part = CheckedData(**{**vars(base), "statistics": counts, "samples": chosen})
    write(tmp_path / "page.html", [part], known, "Letters")
    assert 1_000_000 < (tmp_path / "page.html").stat().st_size < 5_000_000
    shown = embedded_data(tmp_path / "page.html")["parts"][0]["samples"]
    assert 1 < len(shown) < 20 and {len(s["ids"]) for s in shown} == {20_000} and {s["length"] for s in shown} == {size}
