"""The JSON of every report fits docs/report.schema.json, and docs/report.md names its fields."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from nsa_compile.report import RewriteReport
from tests.report.sample import sample_measured, sample_report, sample_with_evidence
from tests.report.schema import SCHEMA, VALIDATOR

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "report.md").read_text(encoding="utf-8")
SAMPLES = [sample_report, sample_with_evidence, sample_measured]


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("make", SAMPLES)
def test_samples_fit(make: Callable[[], RewriteReport]) -> None:
    VALIDATOR.validate(json.loads(make().to_json()))


def test_an_empty_report_fits() -> None:
    VALIDATOR.validate(RewriteReport("M", [], ["it broke"]).to_dict())


@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "golden").glob("*.json")))
def test_golden_files_fit(path: Path) -> None:
    VALIDATOR.validate(json.loads(path.read_text(encoding="utf-8")))


def _without_reason(report: dict[str, Any]) -> None:
    next(site for site in report["sites"] if site["decision"] == "kept")["reason"] = None


def _unknown_field(report: dict[str, Any]) -> None:
    report["sites"][0]["speed"] = 3


def _missing_field(report: dict[str, Any]) -> None:
    del report["sites"][0]["mask"]


def _other_version(report: dict[str, Any]) -> None:
    report["schema_version"] = 2


def _two_times(report: dict[str, Any]) -> None:
    report["sites"][0]["measured"][0]["dense_forward_ms"].pop()


@pytest.mark.parametrize(
    "spoil", [_without_reason, _unknown_field, _missing_field, _other_version, _two_times]
)
def test_what_is_no_report_does_not_fit(spoil: Callable[[dict[str, Any]], None]) -> None:
    report = copy.deepcopy(sample_measured().to_dict())
    VALIDATOR.validate(report)
    spoil(report)
    assert not VALIDATOR.is_valid(report)


@pytest.mark.parametrize(
    ("heading", "properties"),
    [
        ("# The report as JSON", SCHEMA["properties"]),
        ("A site:", SCHEMA["$defs"]["site"]["properties"]),
        ("## Measured times", SCHEMA["$defs"]["bench"]["properties"]),
    ],
)
def test_the_page_names_every_field(heading: str, properties: dict[str, Any]) -> None:
    after = PAGE[PAGE.index(f"{heading}\n") :]
    table = after[after.index("| field") :].split("\n\n")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == set(properties)
