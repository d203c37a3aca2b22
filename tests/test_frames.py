"""Tables of Python give the antibodies that pairs give, and what is no table is refused."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pytest
from tiny_models import HEAVY, LIGHT, engine

from moe_ablm import api
from moe_ablm.data.antibody import Antibody
from moe_ablm.data.readers import open_sources
from moe_ablm.errors import UserError
from moe_ablm.inference.antibodies import SingleChain, given, read
from moe_ablm.inference.frames import items_of

PAIRS = [("EVQLVES", "DIQM"), ("EVQ", ""), ("", "DIQMT")]
ROWS = [{"id": f"ab{n}", "Heavy": h or None, "Light": i or None} for n, (h, i) in enumerate(PAIRS)]
NAMED = [Antibody(f"ab{n}", *pair) for n, pair in enumerate(PAIRS)]


def tables():
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    yield "dict of columns", columns
    yield "list of dicts", ROWS
    yield "arrow", pa.table(columns)
    yield "dict of arrays", {name: np.array(c, object) for name, c in columns.items()}


@pytest.mark.parametrize(
    ("kind", "table"), list(tables()), ids=lambda x: x if type(x) is str else ""
)
def test_a_table_is_its_pairs_with_their_names(kind, table):
    assert items_of(table) == NAMED


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_data_frames_are_scored_as_their_pairs(library):
    frames = pytest.importorskip(library)
    frame = frames.DataFrame(ROWS)
    assert items_of(frame) == NAMED
    expected = api.score(engine(), PAIRS, one_pass=True)["pll"]
    np.testing.assert_array_equal(api.score(engine(), frame, one_pass=True)["pll"], expected)
    assert len(items_of(frame["Heavy"])) == 3  # a series is a list


def test_names_of_published_tables():
    for heavy, light in (("sequence_aa_heavy", "sequence_aa_light"), ("h_sequence", "l_sequence")):
        assert items_of({heavy: ["EVQ"], light: ["DIQ"]}) == [Antibody("", "EVQ", "DIQ")]
    assert items_of({"heavy": ["EVQ"]}) == [Antibody("", "EVQ", "")]
    single = items_of({"sequence": ["EVQ", "DIQ"], "Name": ["a", None]})
    assert single == [SingleChain("a", "EVQ"), SingleChain("", "DIQ")]
    assert items_of([{"sequence_aa": "EVQ"}]) == [SingleChain("", "EVQ")]
    assert items_of({"heavy": "EVQ", "light": "DIQ"}) == [Antibody("", "EVQ", "DIQ")]


@pytest.mark.parametrize(("heavy", "light"), [("VH", "VL"), ("HeavySequence", "LightSequence")])
def test_names_are_read_as_in_files(heavy, light):
    assert items_of({heavy: ["EVQ"], light: ["DIQ"]}) == [Antibody("", "EVQ", "DIQ")]


def test_what_files_are_read_for_is_read_of_tables(tmp_path):
    """Ids of single chains, which may be of either kind, and given regions."""
    single = {"sequence_id": ["h", "l", ""], "sequence": [HEAVY, LIGHT, "EVQLVES"]}
    masks = {"cdr_mask_aa_heavy": ["0011022033000", ""], "cdr_mask_aa_light": ["", ""]}
    pairs = {"id": ["a", "b"], "heavy": ["EVQLVESGGGLVQ", "EVQ"], "light": ["", "DIQ"], **masks}
    layout, path = engine().model.layout, tmp_path / "a.csv"
    for columns in (single, pairs):
        pacsv.write_csv(pa.table(columns), path)
        from_file = list(read(open_sources([str(path)]), layout, 320))
        from_table = given(items_of(columns), layout, 320)
        assert [replace(a, where="") for a in from_table] == [
            replace(a, where="") for a in from_file
        ]
    assert [a.name for a in from_table] == ["a", "b"]
    assert from_table[0].cdr_masks == ("0011022033000", "")
    with pytest.raises(UserError, match="cdr_mask_aa_heavy: found 4 characters, expected 3"):
        given(items_of(pairs | {"cdr_mask_aa_heavy": ["", "0011"]}), layout, 320)


def test_a_column_that_is_there_twice_is_refused():
    pandas = pytest.importorskip("pandas")
    twice = pandas.DataFrame([["EVQ", "QVQ"], ["EVQ", "QVQ"]], columns=["heavy", "heavy"])
    arrow = pa.table([["EVQ"], ["QVQ"]], names=["heavy", "heavy"])
    for table in (twice, arrow):
        with pytest.raises(UserError, match="column heavy is there twice"):
            items_of(table)


def test_a_tuple_is_one_pair_and_a_list_is_several_chains():
    assert items_of(("EVQ", "DIQ")) == [("EVQ", "DIQ")]
    assert items_of(("EVQ", None)) == [("EVQ", None)]
    assert items_of(["EVQ", "DIQ"]) == ["EVQ", "DIQ"]
    assert items_of("EVQ") == ["EVQ"]
    pair = api.embed(engine(), ("EVQLVES", "DIQM"))
    np.testing.assert_array_equal(pair, api.embed(engine(), [("EVQLVES", "DIQM")]))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"V1": ["EVQ"], "V2": ["DIQ"]}, "columns V1, V2; expected sequence_aa_heavy and"),
        ({"heavy": ["EVQ"], "light": ["DIQ", "DIQ"]}, "different lengths"),
        ({"heavy": ["EVQ", 7], "light": ["DIQ", ""]}, "row 2, column heavy: found 7"),
        (5, "found 5"),
    ],
)
def test_what_is_no_table_is_refused(given, words):
    with pytest.raises(UserError, match=words):
        items_of(given)
