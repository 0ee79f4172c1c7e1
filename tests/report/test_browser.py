"""The HTML report in a real browser: it renders light and dark, wide and narrow, and reacts."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from nsa_compile.passes.reasons import Reason
from nsa_compile.report import RewriteReport
from tests.report.browser import Browser, needed
from tests.report.sample import kept, make_record, sample_measured

pytestmark = needed
GREEN, GREEN_ON_DARK = (0x1A, 0x7F, 0x37), (0x3F, 0xB9, 0x50)  # --converted in style.css
AMBER, AMBER_ON_DARK = (0x9A, 0x67, 0x00), (0xD2, 0x99, 0x22)  # --kept
SIZES = {"wide": (1280, 1800), "narrow": (500, 1800)}


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    return Browser(tmp_path)


def large() -> RewriteReport:
    records = [make_record(f"model.layers.{i}.self_attn") for i in range(78)]
    records += [kept(f"model.layers.{i}.self_attn", Reason.DROPOUT, "p=0.1") for i in (78, 79)]
    return RewriteReport("LlamaForCausalLM", records)


def share(image: np.ndarray, colour: tuple[int, int, int]) -> float:
    """How much of ``image`` has just this colour."""
    return float((np.abs(image * 255 - np.array(colour)) < 2).all(axis=-1).mean())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("make", [large, sample_measured])
def test_it_renders(browser: Browser, make: object, dark: bool, size: str) -> None:
    image = browser.screenshot(make().to_html(), SIZES[size], dark=dark)  # type: ignore[operator]
    page = (0x0D, 0x11, 0x17) if dark else (255, 255, 255)
    assert 0.5 < share(image, page) < 0.99
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50
    top = image[: image.shape[0] // 2]
    assert share(top, GREEN_ON_DARK if dark else GREEN) > 1e-3
    assert share(top, AMBER_ON_DARK if dark else AMBER) > 1e-5


@pytest.mark.parametrize("width", [420, 1280])
@pytest.mark.parametrize("make", [large, sample_measured])
def test_only_parts_of_the_page_scroll_sideways(browser: Browser, make: object, width: int) -> None:
    script = "const e = document.documentElement; document.title = e.scrollWidth - e.clientWidth;"
    found = browser.after(make().to_html(), script, width=width)  # type: ignore[operator]
    assert "<title>0</title>" in found


def shown(page: str) -> list[str]:
    """The reasons of the layers that are shown."""
    opened = re.findall(r"<details [^>]*>", page)
    return [re.search(r'data-reason="(\w+)"', tag)[1] for tag in opened if " hidden" not in tag]


def dimmed(page: str) -> int:
    return len(re.findall(r'class="node \w+ dim"', page))


def test_the_filter_hides_other_layers_and_dims_them_in_the_picture(browser: Browser) -> None:
    script = "filter.value = 'dropout'; filter.dispatchEvent(new Event('change'));"
    page = browser.after(large().to_html(), script + "document.title = location.hash;")
    assert shown(page) == ["dropout", "dropout"]
    assert dimmed(page) == 78
    assert "<title>#reason=dropout</title>" in page
    again = "filter.value = ''; filter.dispatchEvent(new Event('change'));"
    page = browser.after(large().to_html(), script + again)
    assert (len(shown(page)), dimmed(page)) == (80, 0)


def test_a_link_opens_the_page_filtered(browser: Browser) -> None:
    page = browser.after(sample_measured().to_html(), fragment="#reason=mask_not_understood")
    assert shown(page) == ["mask_not_understood"]
    page = browser.after(sample_measured().to_html(), fragment="#reason=nonsense")
    assert len(shown(page)) == 6


@pytest.mark.parametrize("fragment", ["", "#reason=converted"])
def test_a_click_on_the_picture_opens_the_layer(browser: Browser, fragment: str) -> None:
    script = (
        "document.querySelector('a[href=\"#site-79\"]')"
        ".dispatchEvent(new MouseEvent('click', {bubbles: true, cancelable: true}));"
        # The page answers once its own handlers ran.
        "setTimeout(() => { document.title = document.getElementById('site-79').open; });"
    )
    page = browser.after(large().to_html(), script, fragment=fragment)
    assert "<title>true</title>" in page
    assert len(shown(page)) == 80
    assert re.search(r'id="site-79"[^>]* open=""', page)


def test_no_script_fails_and_nothing_is_refused(browser: Browser) -> None:
    page = sample_measured().to_html()
    listen = (
        "<script>const found = [];"
        "addEventListener('error', (e) => found.push(e.message));"
        "document.addEventListener('securitypolicyviolation', (e) => found.push(e.blockedURI));"
        "</script>"
    )
    page = page.replace("<style>", f"{listen}<style>", 1)
    assert "<title>none</title>" in browser.after(page, "document.title = found.join() || 'none';")
