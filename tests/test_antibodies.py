"""Antibodies from files and from Python, and the rows of tokens that they become."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import HEAVY, LIGHT

from moe_ablm.data.antibody import Antibody, row_of, tokens_of
from moe_ablm.data.readers import open_sources
from moe_ablm.data.tokenizer import CLS, EOS, LAYOUTS, MASK, NULL, VOCABULARY, Layout, encode
from moe_ablm.errors import UserError
from moe_ablm.inference.antibodies import LETTERS, given, labels, read, windows
from moe_ablm.inference.infill import INFILLED

ESM = LAYOUTS["esm"]


def found(*inputs, longest: int = 320, letters: str = LETTERS, **options) -> list[Antibody]:
    sources = open_sources([str(i) for i in inputs], letters=letters, **options)
    return list(read(sources, ESM, longest))


def chains(antibodies: list[Antibody]) -> list[tuple[str, str, str]]:
    return [(a.name, a.heavy, a.light) for a in antibodies]


def ids(letters: str) -> list[int]:
    return encode(np.frombuffer(letters.encode(), np.uint8)).tolist()


@pytest.mark.parametrize(
    ("layout", "between"), [("esm", [CLS, CLS]), ("balm", [EOS]), ("sep", [NULL])]
)
def test_a_row_is_chains_with_special_tokens_around(layout, between):
    row = row_of(Antibody("a", "EVQ", "DI"), LAYOUTS[layout])
    assert row.tokens.tolist() == [CLS, *ids("EVQ"), *between, *ids("DI"), EOS]
    assert row.tokens[row.places].tolist() == ids("EVQDI")
    assert tokens_of(Antibody("a", "EVQ", "DI"), LAYOUTS[layout]) == len(row.tokens)


@pytest.mark.parametrize("chain", ["heavy", "light"])
def test_a_single_chain_has_no_separator(chain):
    antibody = Antibody("a", **{"heavy": "", "light": "", chain: "EVQ"})
    row = row_of(antibody, ESM)
    assert row.tokens.tolist() == [CLS, *ids("EVQ"), EOS]
    assert row.places.tolist() == [1, 2, 3]
    assert tokens_of(antibody, ESM) == 5


def test_masks_and_ambiguous_residues_have_tokens_of_their_own():
    row = row_of(Antibody("a", "E_XB", ""), ESM)
    assert row.tokens[1:-1].tolist() == [*ids("E"), MASK, *map(VOCABULARY.index, "XB")]


def test_labels_name_every_residue():
    assert labels([Antibody("a", "EV", "D"), Antibody("b", "", "Q")]) == {
        "sequence_id": ["a", "a", "a", "b"],
        "chain": ["heavy", "heavy", "light", "light"],
        "position": [1, 2, 1, 1],
        "residue": ["E", "V", "D", "Q"],
    }


def test_every_format_gives_the_same_antibodies(tmp_path):
    heavies, lights = [HEAVY, HEAVY[:-1], HEAVY[1:]], [LIGHT, LIGHT[:-2], LIGHT[1:]]
    expected = list(zip(("p", "q", "r"), heavies, lights, strict=True))
    table = pa.table({"sequence_id": list("pqr"), "heavy": heavies, "light": lights})
    pq.write_table(table, tmp_path / "a.parquet")
    lines = [",".join(row) for row in [("id", "heavy", "light"), *expected]]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    fasta = "".join(f">{n}|H\n{h}\n>{n}|L\n{li.lower()}\n" for n, h, li in expected)
    (tmp_path / "a.fasta").write_text(fasta)
    airr = ["sequence_id\tlocus\tv_call\tcell_id\tsequence_aa"]
    for name, heavy, light in expected:
        airr.append(f"{name}1\tIGH\tIGHV3-23*01\t{name}\t{heavy}")
        airr.append(f"{name}2\tIGK\tIGKV1-39*01\t{name}\t{light}")
    (tmp_path / "a.tsv").write_text("\n".join(airr) + "\n")
    for file in ("a.parquet", "a.csv", "a.fasta"):
        assert chains(found(tmp_path / file)) == expected, file
    # cells of AIRR tables are named with their sample
    assert [c[1:] for c in chains(found(tmp_path / "a.tsv"))] == [e[1:] for e in expected]


def test_whether_a_chain_is_a_light_one_annotation_finds_out(tmp_path):
    (tmp_path / "a.fasta").write_text(f">a\n{HEAVY}\n>b\n{LIGHT}\n>c\nEVQX\n")
    expected = [("a", HEAVY, ""), ("b", "", LIGHT), ("c", "EVQX", "")]
    assert chains(found(tmp_path / "a.fasta")) == expected


def test_masks_are_spelled_in_three_ways(tmp_path):
    (tmp_path / "a.csv").write_text("heavy,light\nev_l*,D<mask>Q\n")
    assert chains(found(tmp_path / "a.csv", letters=INFILLED)) == [("1", "EV_L_", "D_Q")]
    (tmp_path / "b.csv").write_text("sequence\nEV<mask>L<cls><cls>D<MASK>Q\n")
    assert chains(found(tmp_path / "b.csv", letters=INFILLED)) == [("1", "EV_L", "D_Q")]


@pytest.mark.parametrize("letter", ["_", "*", "<mask>", "J", "-", "é"])
def test_what_is_no_residue_is_refused_with_its_place(tmp_path, letter):
    (tmp_path / "a.csv").write_text(f"heavy,light\nEVQ,DIQ\nEV{letter}Q,DIQ\n")
    with pytest.raises(UserError, match=r"a\.csv: row 2 \(line 3\).*residue 3.*--on-bad-row=skip"):
        found(tmp_path / "a.csv")
    sources = open_sources([str(tmp_path / "a.csv")], letters=LETTERS, on_bad_row="skip")
    assert len(list(read(sources, ESM, 320))) == 1
    assert sources[0].report.rejected.total() == 1


def test_a_sequence_that_is_too_long_is_refused_or_left_out(tmp_path):
    (tmp_path / "a.csv").write_text("id,heavy,light\nshort,EV,DI\nlong,EVQLV,DIQ\n")
    words = "row 2.*long: too long for this model: 12 tokens.*at most 8.*annotate"
    with pytest.raises(UserError, match=words):
        found(tmp_path / "a.csv", longest=8)
    kept = found(tmp_path / "a.csv", longest=8, on_bad_row="skip")
    assert [a.name for a in kept] == ["short"]
    assert len(found(tmp_path / "a.csv", longest=12)) == 2
    with pytest.raises(UserError, match="12 tokens.*at most 11"):
        given([("EVQLV", "DIQ")], ESM, 11)


def test_chains_from_python():
    expected = [("1", HEAVY, LIGHT), ("2", HEAVY, ""), ("3", "", LIGHT), ("4", "", LIGHT)]
    items = [(HEAVY.lower(), LIGHT), HEAVY, LIGHT, (None, f" {LIGHT} ")]
    assert chains(given(items, ESM, 320)) == expected
    assert chains(given(HEAVY, ESM, 320)) == expected[1:2][:0] + [("1", HEAVY, "")]
    assert given([], ESM, 320) == []


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (("EVQ", "DI", "X"), "item 1.*expected heavy"),
        (7, "item 1: found 7"),
        (("", ""), "row 1: no sequence"),
        (("ND", None), "row 1: no sequence"),
        ("ACGTN" * 8, "row 1: .*nucleotides, expected amino acids"),
        (("EVQLVnanESG", ""), "row 1: .*missing value at residue 6"),
        ("EVJ", "'J' at residue 3"),
    ],
)
def test_what_is_no_antibody_is_refused(item, words):
    with pytest.raises(UserError, match=words):
        given([item], ESM, 320)


def test_annotation_of_the_source_is_kept(tmp_path):
    mask = "0" * 25 + "1" * 8 + "0" * (len(HEAVY) - 33)
    columns = {"sequence_aa_heavy": [HEAVY], "sequence_aa_light": [LIGHT]}
    pq.write_table(pa.table(columns | {"cdr_mask_aa_heavy": [mask]}), tmp_path / "a.parquet")
    assert found(tmp_path / "a.parquet")[0].cdr_masks == (mask, "")


def test_windows_are_bounded_and_lose_nothing():
    antibodies = [Antibody(str(i), "E" * n, "") for i, n in enumerate([3, 3, 9, 1, 1, 1, 4])]
    groups = list(windows(antibodies, lambda a: (a.residues, 1), (6, 2)))
    assert [[a.residues for a in group] for group in groups] == [[3, 3], [9], [1, 1], [1, 4]]


def test_a_layout_may_say_what_a_lone_light_chain_begins_with():
    layout = Layout((0, 3), (2, 29), (2,), lone_light=(0, 29))
    heavy, light, both = (given([x], layout, 64)[0] for x in (("AG", ""), ("", "AG"), ("AG", "GA")))
    assert row_of(heavy, layout).tokens.tolist() == [0, 3, 5, 6, 2]
    assert row_of(light, layout).tokens.tolist() == [0, 29, 5, 6, 2]
    assert row_of(both, layout).tokens.tolist() == [0, 3, 5, 6, 2, 29, 6, 5, 2]
    assert repr(layout) == "Layout(before=(0, 3), between=(2, 29), after=(2,))"  # in digests
