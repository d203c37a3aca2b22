"""Several chains of a cell: which is taken, by what, and what is said of it."""

import pyarrow as pa
import pytest
from tiny_models import HEAVY, LIGHT

from moe_ablm.data.readers.cells import MISSING_COUNT, join_cells
from moe_ablm.data.readers.options import Reading
from moe_ablm.data.readers.report import Report
from moe_ablm.errors import UserError

FIRST = "several light chains: the first taken, no count tells them apart"
MOST = "several light chains: the most abundant taken"


def joined(rows, **reading):
    """Antibodies and report of rows (cell, chain, sequence, umis, reads); None is no count."""
    columns = zip(*rows, strict=True)
    names = ("cell", "chain", "sequence", "umis", "reads")
    table = dict(zip(names, map(list, columns), strict=True))
    for name in ("umis", "reads"):
        counts = [MISSING_COUNT if v is None else float(v) for v in table[name]]
        table[name] = pa.array(counts, pa.float64())
    table |= {"sequence_id": [str(i) for i in range(len(rows))], "_row": range(1, len(rows) + 1)}
    table["_line"] = [0] * len(rows)
    batch = pa.record_batch({k: pa.array(v) for k, v in table.items()})
    report = Report("t", read=len(rows))
    found = [r for b in join_cells([batch], report, Reading(**reading)) for r in b.to_pylist()]
    report.settle(len(found))
    return [(r["sequence_aa_heavy"], r["sequence_aa_light"]) for r in found], report


@pytest.mark.parametrize(
    ("counts", "taken", "remark"),
    [
        ([(3, 90), (5, 10)], 1, MOST),  # UMIs come before reads
        ([(5, 10), (5, 90)], 1, MOST),  # of equal ones the reads decide
        ([(5, None), (3, None)], 0, MOST),
        ([(None, 10), (None, 90)], 1, MOST),
        ([(9, 10), (None, 90)], 1, MOST),  # UMIs of one alone compare nothing
        ([(5, 7), (5, 7)], 0, FIRST),
        ([(5, None), (5, 90)], 0, FIRST),
        ([(None, None), (None, None)], 0, FIRST),
    ],
)
def test_the_light_chain_of_a_cell(counts, taken, remark):
    lights = [LIGHT, LIGHT[1:]]
    rows = [("c", "heavy", HEAVY, None, None)]
    rows += [("c", "light", s, *c) for s, c in zip(lights, counts, strict=True)]
    found, report = joined(rows)
    assert found == [(HEAVY, lights[taken])]
    assert report.notes == {f"cell with {remark}": 1}
    assert report.rejected == {"further light chain of a cell": 1} and report.joined == 1


@pytest.mark.parametrize(
    ("counts", "dominance", "taken"),
    [
        ([(85, None), (1, None)], 10, 0),
        ([(1, 900), (10, 1)], 10, 1),
        ([(9, None), (1, None)], 10, None),
        ([(9, None), (1, None)], 5, 0),
        ([(None, 100), (None, 10)], 10, 0),
        ([(None, None), (None, None)], 10, None),
        ([(0, None), (0, None)], 10, None),
        ([(20, 7), (None, 7)], 10, None),
    ],
)
def test_the_heavy_chain_of_a_cell(counts, dominance, taken):
    heavies = [HEAVY, HEAVY[1:]]
    rows = [("c", "heavy", s, *c) for s, c in zip(heavies, counts, strict=True)]
    found, report = joined([*rows, ("c", "light", LIGHT, 1, 1)], dominance=dominance)
    if taken is None:
        assert found == [] and report.rejected == {"cell with several heavy chains": 3}
        return
    assert found == [(heavies[taken], LIGHT)]
    assert report.rejected == {"further heavy chain of a cell": 1}
    (remark,) = report.notes
    assert f"at least {dominance} times" in remark


def test_a_chain_twice_is_one_chain():
    rows = [("c", "heavy", HEAVY, 2, 2), ("c", "heavy", HEAVY, 2, 2), ("c", "light", LIGHT, 1, 1)]
    found, report = joined(rows)
    assert found == [(HEAVY, LIGHT)]
    assert report.rejected == {"chain that its cell has already": 1}


def test_a_chain_of_a_cell_that_is_not_named_is_found_by_annotation_or_counted():
    unknown = [("c", "", LIGHT, 1, 1), ("c", "", HEAVY, 1, 1), ("c", "", HEAVY[:70], 1, 1)]
    found, report = joined(unknown)
    assert found == [(HEAVY, LIGHT)] and report.joined == 1
    assert report.rejected == {"neither heavy nor light chain": 1}


def test_a_ratio_of_one_is_refused():
    with pytest.raises(UserError, match="--dominance 1: expected more than 1"):
        Reading(dominance=1)
