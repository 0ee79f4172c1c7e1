"""The HTML report: golden file, well-formed, self-contained, escaped, linked and filterable."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch

from nsa_compile.report import RewriteReport
from tests.report.sample import (
    kept,
    make_record,
    sample_measured,
    sample_report,
    sample_with_evidence,
)

VOID = {"meta", "link"}


class Page(HTMLParser):
    """Every element with its attributes and text; a tag that is not closed fails."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.open: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = (tag, {name: value or "" for name, value in attrs}, [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element[2].append(data)

    def all(self, tag: str, class_: str = "") -> list[tuple[dict[str, str], str]]:
        return [
            (attributes, "".join(text))
            for name, attributes, text in self.elements
            if name == tag and class_ in ["", *attributes.get("class", "").split()]
        ]


@pytest.fixture(autouse=True)
def _fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0")


@pytest.fixture(
    params=[sample_report, sample_with_evidence, sample_measured],
    ids=["plain", "evidence", "measured"],
)
def report(request: pytest.FixtureRequest) -> RewriteReport:
    made: RewriteReport = request.param()
    return made


def test_two_runs_are_equal(report: RewriteReport) -> None:
    assert report.to_html() == report.to_html()


def test_nothing_is_requested_from_anywhere(report: RewriteReport) -> None:
    text = report.to_html()
    assert not re.findall(r"https?:|//[a-z]|@import|url\(|\bfetch\(|XMLHttp", text)
    page = Page(text)
    assert all("src" not in attributes for _, attributes, _ in page.elements)
    links = [attributes["href"] for _, attributes, _ in page.elements if "href" in attributes]
    assert all(link.startswith(("#site-", "data:,")) for link in links)
    (policy,) = [a["content"] for a, _ in page.all("meta") if "http-equiv" in a]
    assert "default-src 'none'" in policy


def test_what_a_model_calls_itself_stays_text() -> None:
    text = sample_with_evidence().to_html()
    page = Page(text)
    assert page.all("h1") == [({}, "Model<script>alert(1)</script>")]
    assert len(page.all("script")) == 1
    assert page.all("b", "")[0][1].startswith("mask_not_understood")
    assert "<b>\"bold\"</b> & 'odd'" in "".join(text for _, text in page.all("details", "kept"))
    for a in ("'", '"'):
        odd = RewriteReport("M", [make_record(f"a{a} onclick={a}x<y")]).to_html()
        assert all("onclick" not in attributes for _, attributes, _ in Page(odd).elements)


def test_every_layer_has_a_place_in_the_picture_that_leads_to_its_details(
    report: RewriteReport,
) -> None:
    page = Page(report.to_html())
    nodes, details = page.all("a", "node"), page.all("details")
    ids = [f"site-{index}" for index in range(len(report.sites))]
    assert [attributes["id"] for attributes, _ in details] == ids
    assert sorted(attributes["href"] for attributes, _ in nodes) == sorted(f"#{i}" for i in ids)
    by_id = {attributes["id"]: attributes for attributes, _ in details}
    for attributes, _ in nodes:
        site = report.sites[int(attributes["href"].removeprefix("#site-"))]
        assert site.decision in attributes["class"].split()
        assert attributes["data-reason"] == by_id[attributes["href"][1:]]["data-reason"]


def test_the_filter_has_every_verdict_with_its_count(report: RewriteReport) -> None:
    options = {
        attributes["value"]: text for attributes, text in Page(report.to_html()).all("option")
    }
    reasons = [attributes["data-reason"] for attributes, _ in Page(report.to_html()).all("details")]
    assert list(options) == ["", *sorted(set(reasons))]
    for verdict, text in options.items():
        count = reasons.count(verdict) if verdict else len(reasons)
        assert text.endswith(f"({count})")


def test_the_page_is_light_and_dark() -> None:
    ((_, style),) = Page(sample_report().to_html()).all("style")
    assert "color-scheme: light dark" in style
    assert "prefers-color-scheme: dark" in style
    used, light = set(re.findall(r"var\((--\w+)\)", style)), style.split("@media")[0]
    dark = style.split("@media")[1].split("body")[0]
    assert used <= set(re.findall(r"(--\w+):", light)) & set(re.findall(r"(--\w+):", dark))


def test_the_script_finds_what_it_looks_for() -> None:
    page = Page(sample_with_evidence().to_html())
    ((_, script),) = page.all("script")
    ids = {attributes.get("id") for _, attributes, _ in page.elements}
    assert set(re.findall(r'getElementById\("(\w+)"\)', script)) <= ids
    assert {"filter", "layers"} <= ids


def test_costs_are_drawn_and_called_a_prediction() -> None:
    page = Page(sample_with_evidence().to_html())
    charts = page.all("figure")
    assert len(charts) == 3
    assert all("predicted" in text for _, text in charts)
    points = [attributes["points"].split() for attributes, _ in page.all("polyline")]
    assert [len(each) for each in points] == [7] * 6
    assert "5 of 6 layers together" in "".join(text for _, text in page.all("p"))
    assert page.all("line", "break-even")
    assert Page(sample_report().to_html()).all("figure") == []


def test_an_empty_report() -> None:
    page = Page(RewriteReport("Conv").to_html())
    assert "no attention found" in page.all("p", "summary")[0][1]
    assert page.all("svg") == []
    assert (
        "it broke" in Page(RewriteReport("M", [], ["it broke"]).to_html()).all("p", "failure")[0][1]
    )


def test_a_module_may_be_a_layer_and_hold_layers() -> None:
    from nsa_compile.passes.reasons import Reason

    sites = [make_record("a"), make_record("a.b"), kept("a.b", Reason.DROPOUT, "", ordinal=1)]
    nodes = Page(RewriteReport("M", sites).to_html()).all("a", "node")
    assert sorted(attributes["href"] for attributes, _ in nodes) == [f"#site-{i}" for i in range(3)]
