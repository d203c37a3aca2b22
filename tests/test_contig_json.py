"""Cell Ranger's contigs as JSON give what its CSV gives."""

import gzip
import json

import pytest
from test_repertoire import CUTS_H, CUTS_L, H1, H2, L1, TEN_X, pairs, read

from moe_ablm.data.readers.contig_json import is_contig_json
from moe_ablm.errors import UserError


def contig(barcode, number, chain, sequence, cuts, **more) -> dict:
    ends = [0, *cuts, len(sequence)]
    cut = [sequence[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
    regions = {n: {"start": 1, "aa_seq": p} for n, p in zip(TEN_X, cut, strict=True)}
    regions["cdr3"] = cut[5]  # a text, unlike the others
    feature = {"chain": chain, "gene_name": f"{chain}V1-1", "region_type": "L-REGION+V-REGION"}
    about = {"barcode": barcode, "contig_name": f"{barcode}_contig_{number}"}
    about |= {"productive": True, "is_cell": True, "high_confidence": True, "umi_count": 9}
    return about | regions | {"annotations": [{"feature": feature}]} | more


CONTIGS = [
    contig("A-1", 1, "IGH", H1, CUTS_H),
    contig("A-1", 2, "IGK", L1, CUTS_L),
    contig("A-2", 1, "IGH", H2, CUTS_H, productive=False),
    contig("A-3", 1, "IGH", H2, CUTS_H, is_cell=False),
    contig("A-4", 1, "TRB", H2, CUTS_H),
    contig("A-5", 1, "IGH", H2, CUTS_H, fwr1=None, annotations=None),
]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("indent", [None, 4])
def test_contigs_are_joined_and_counted(tmp_path, pack, indent):
    (tmp_path / "a.json").write_bytes(pack(json.dumps(CONTIGS, indent=indent).encode()))
    rows, report = read(tmp_path / "a.json")
    assert report.format == "10x" and pairs(rows) == {(H1, L1)} and report.read == 6
    reasons = ("not productive", "not a cell", "T-cell receptor", "region missing: fwr1")
    assert report.rejected == dict.fromkeys(reasons, 1)


@pytest.mark.parametrize("text", ["[", "[1, 2]", "[]", '[{"barcode": "A"}]', "[" * 100_000])
def test_other_json_is_refused_in_a_line(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json") as error:
        read(tmp_path / "a.json")
    assert "\n" not in str(error.value)


def test_an_array_in_one_line_of_any_length(tmp_path):
    more = [contig(f"B-{i}", 1, "TRA", H2, CUTS_H) for i in range(2500)]
    (tmp_path / "a.json").write_text(json.dumps(CONTIGS + more))
    assert (tmp_path / "a.json").stat().st_size > 1 << 20
    rows, report = read(tmp_path / "a.json")
    assert pairs(rows) == {(H1, L1)} and report.rejected["T-cell receptor"] == 2501


def test_what_begins_an_array(tmp_path):
    (tmp_path / "a").write_text(" \n[{")
    (tmp_path / "b").write_text("barcode,contig_id")
    assert is_contig_json(tmp_path / "a") and not is_contig_json(tmp_path / "b")
