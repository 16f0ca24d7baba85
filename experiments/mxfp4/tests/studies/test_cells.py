"""Rows of a comparison."""

import pytest

from experiments.mxfp4.layers.recipes import (
    RECIPES,
)
from experiments.mxfp4.studies.cells import ABLATIONS, CELLS, GROUPS, chosen_cells


def test_every_row_of_the_tables_is_a_cell() -> None:
    rows = {name for names in GROUPS.values() for name in names}
    assert rows | {"plain"} == set(CELLS)
    assert not ABLATIONS.keys() & RECIPES.keys()


def test_cells_of_a_list() -> None:
    assert [r.name for r in chosen_cells("quartet, dgrad_only")] == [
        "plain",
        "quartet",
        "dgrad_only",
    ]
    assert [r.name for r in chosen_cells("")] == list(CELLS)
    with pytest.raises(ValueError, match=r"cell 'dgrad' is unknown; .*; did you mean 'dgrad_only'"):
        chosen_cells("dgrad")
