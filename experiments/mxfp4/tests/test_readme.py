"""The stored reports and the README show what the stored results and the rooms say."""

import json

import pytest

from experiments.mxfp4.speed import forecast, measured
from experiments.mxfp4.studies import error_tables, report
from experiments.mxfp4.studies.cells import CELLS
from experiments.mxfp4.studies.report import by_name, markdown, read_cells
from tests.support.runs import ROOT

RESULTS = ROOT / "experiments" / "mxfp4" / "results"


README = ROOT / "experiments" / "mxfp4" / "README.md"


@pytest.mark.parametrize(("folder", "cells"), [("toy_cpu", len(CELLS)), ("d4_cpu", 8)])
def test_the_stored_report_is_of_the_stored_cells(folder: str, cells: int) -> None:
    found = read_cells(RESULTS / folder)
    assert (RESULTS / folder / "report.md").read_text() == markdown(found)
    named = by_name(found)
    assert len(named) == cells
    assert set(named) <= set(CELLS)
    assert all(set(own) == {0, 1, 2} for own in named.values())


def test_the_stored_tables_of_errors_are_of_the_stored_rows() -> None:
    document = json.loads((RESULTS / "errors_d4.json").read_text())
    assert (RESULTS / "errors_d4.md").read_text() == error_tables.markdown(document)


def test_the_readme_shows_what_was_computed() -> None:
    text = README.read_text(encoding="utf-8")
    assert measured.markdown([]) in text
    title = forecast.WHAT[0]
    rows = {name: forecast.ratios(name, forecast.REACHED, title) for name in forecast.SHOWN}
    assert forecast.table(title, rows) in text
    for folder in ("toy_cpu", "d4_cpu"):
        assert report.verdict(by_name(read_cells(RESULTS / folder))) in text
    rows = json.loads((RESULTS / "errors_d4.json").read_text())["rows"]
    place = ("attn.c_proj", "x^T")
    column = {r["quantizer"]: r for r in rows if (r["layers"], r["operand"]) == place}
    names = ("mxfp4 even", "mxfp4 even hadamard", "mxfp4 even hadamard, signs")
    plain, transformed, signed = (f"{1e3 * column[n]['relative_error']:.1f}" for n in names)
    assert f"from {plain} to {transformed} thousandths" in text
    assert f"it is {signed}." in text
