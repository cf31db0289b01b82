"""The page on randomness shows the tables that the report prints from the committed results."""

from __future__ import annotations

import json

import pytest

from support.paths import ROOT

from . import report

RESULTS = ROOT / "docs" / "results" / "battery-2026-11-29.json"
PAGE = ROOT / "docs" / "explanation" / "statistics.md"


@pytest.mark.parametrize("table", [report.table_of_real, report.table_of_controls])
def test_the_page_shows_the_table(table):
    assert table(json.loads(RESULTS.read_text())) in PAGE.read_text()


def test_a_control_that_no_test_detects_is_a_row():
    found = {"controls": {"planted": {"failed": 0, "tests": 5, "strongest": []}}}
    assert report.table_of_controls(found).splitlines()[-1] == "| planted | 0 of 5 | - |  |"
