"""Numbers and regions beside residues, and residues chosen by them, in what verbs compute."""

import csv

import numpy as np
import pytest
from tiny_models import HEAVY, LIGHT, engine, tiny_model

from moe_ablm import api
from moe_ablm.__main__ import main
from moe_ablm.data.antibody import Antibody
from moe_ablm.data.germline import load_germlines
from moe_ablm.data.positions import selection
from moe_ablm.errors import UserError
from moe_ablm.inference import infill, route, scan, score
from moe_ablm.inference.numbers import chosen, masked, nothing_chosen, numbered_labels
from moe_ablm.inference.sampling import Sampling
from moe_ablm.interop.saved import save_model

PAIR, ALONE = Antibody("a", HEAVY, LIGHT), Antibody("a", HEAVY, "")
MODEL = engine("topk")
CDRH3 = HEAVY.index("AKDRGYSYGFDY")


def at(positions: str, scheme: str = "imgt", regions: str | None = None):
    found = selection(regions, positions, scheme)
    assert found is not None
    return found


def test_labels_of_residues():
    found = numbered_labels([PAIR, Antibody("b", "", "EVQLX")], "imgt")
    cys = HEAVY.index("CAKD")
    assert (found["number"][cys], found["region"][cys]) == ("104", "FRH3")
    assert (found["number"][CDRH3 + 5], found["number"][CDRH3 + 6]) == ("110", "112")
    assert found["region"][CDRH3 : CDRH3 + 12] == ["CDRH3"] * 12
    assert found["number"][-5:] == [""] * 5 == found["region"][-5:]
    assert found["number"][len(HEAVY)] == "1" and found["region"][len(HEAVY)] == "FRL1"
    kabat = numbered_labels([PAIR], "kabat")["number"]
    assert kabat[cys] == "92" and kabat[CDRH3 : CDRH3 + 12][6:10] == ["99", "100", "100A", "100B"]


def test_regions_of_the_source_stay():
    heavy = "EVQLVESGGGLVQ"
    found = numbered_labels([Antibody("a", heavy, "", cdr_masks=("0011022033000", ""))], "imgt")
    assert found["region"][:3] == ["FRH1", "FRH1", "CDRH1"] and set(found["number"]) == {""}


def test_chosen_residues_are_masked():
    text = masked(PAIR, at("H105-H117"))
    assert text.heavy == HEAVY[:CDRH3] + "_" * 12 + HEAVY[CDRH3 + 12 :] and text.light == LIGHT
    assert masked(PAIR, at("H95-H102", "kabat")).heavy.count("_") == 10
    assert chosen(PAIR, at("L1", regions="CDRL2")).sum() == 1 + 3
    assert nothing_chosen(PAIR, at("H10")) and nothing_chosen(PAIR, at("H11")) is None
    assert nothing_chosen(Antibody("a", "EVQLV", ""), at("H1-H128"))


def test_numbers_in_the_tables_of_verbs():
    tables = {
        "score": score.table(MODEL, [ALONE], "residue", one_pass=True),
        "route": route.table(MODEL, [ALONE]),
        "infill": infill.table(MODEL, [masked(ALONE, at("H107-H108"))], "residue", Sampling()),
    }
    for name, table in tables.items():
        lines = [line for line in table.to_pylist() if line["position"] == CDRH3 + 3]
        assert lines, name
        assert {(line["number"], line["region"]) for line in lines} == {("107", "CDRH3")}, name
    assert tables["infill"].num_rows == 2


def test_tables_of_verbs_number_by_the_germlines_that_are_given(tmp_path):
    """IGHV3-23 with the gap of framework 1 at 9 instead of 10: the ninth residue is 10."""
    human = load_germlines()
    (gene,) = (v for v in human.v if v.name == "IGHV3-23*01")
    codons = ["..."] * int(gene.imgt[-1])
    for i, position in enumerate(gene.imgt.tolist()):
        codons[position + (position == 9) - 1] = gene.nucleotides[3 * i : 3 * i + 3]
    (j,) = (j for j in human.j if j.name == "IGHJ4*02")
    (tmp_path / "h.fasta").write_text(
        f">{gene.name}\n{''.join(codons)}\n>{j.name}\n{j.nucleotides}\n"
    )
    other, masked_9 = (str(tmp_path),), Antibody("a", HEAVY[:8] + "_" + HEAVY[9:], "")
    (wild_type,) = scan.scan(MODEL, [ALONE], "wild-type-marginal")
    tables = {
        "score": score.table(MODEL, [ALONE], "residue", one_pass=True, germlines=other),
        "route": route.table(MODEL, [ALONE], germlines=other),
        "infill": infill.table(MODEL, [masked_9], "residue", Sampling(), germlines=other),
        "scan": scan.table([ALONE], [wild_type], germlines=other),
    }
    for name, table in tables.items():
        lines = [line for line in table.to_pylist() if line["position"] == 9]
        assert {line["number"] for line in lines} == {"10"}, name
    assert numbered_labels([ALONE], "imgt")["number"][8] == "9"


@pytest.mark.parametrize("method", scan.METHODS)
def test_scan_of_chosen_residues_is_that_part_of_the_whole(method):
    only = at("H105-H107", regions="FRH4" if method != "mutant-marginal" else None)
    (part,) = scan.scan(MODEL, [ALONE], method, only)
    here = chosen(ALONE, only)
    assert np.isnan(part[~here]).all() and not np.isnan(part[here]).any()
    lines = scan.table([ALONE], [part]).to_pylist()
    assert len(lines) == 19 * here.sum() and lines[0]["number"] == "105"
    each = dict(zip(scan.METHODS, (1, 0, 19), strict=True))[method]
    assert scan.passes(ALONE, method, only) == max(1, here.sum() * each)
    if method != "mutant-marginal":  # 19 passes a residue
        (whole,) = scan.scan(MODEL, [ALONE], method)
        np.testing.assert_allclose(part[here], whole[here], rtol=2e-5, atol=2e-5)


def test_in_python():
    (done,) = api.infill(MODEL, [(HEAVY, "")], positions=["H108", "H109"])
    assert sorted(f["place"] for f in done["filled"]) == [CDRH3 + 3, CDRH3 + 4]
    (odds,) = api.scan(MODEL, [(HEAVY, "")], "wild-type-marginal", regions="CDRH3")
    assert (~np.isnan(odds)).all(axis=1).nonzero()[0].tolist() == [*range(CDRH3, CDRH3 + 12)]
    with pytest.raises(UserError, match="nothing chosen"):
        api.scan(MODEL, [("", LIGHT)], regions="CDRH3")
    with pytest.raises(UserError, match="positions='3': '3' is no position"):
        api.infill(MODEL, [(HEAVY, "")], positions="3")


def test_on_the_command_line(tmp_path, capsys):
    """An antibody without the chosen residues is a bad row; the command goes on where it was."""
    save_model(tiny_model("topk"), tmp_path / "run")
    source, out = tmp_path / "a.csv", tmp_path / "out.csv"
    source.write_text(f"id,heavy,light\na,{HEAVY},\nb,,{LIGHT}\n")
    flags = ["--run", tmp_path / "run", "--input", source, "--method", "wild-type-marginal"]
    flags += ["--regions", "CDRH3", "--positions", "H103", "--numbering", "kabat", "--out", out]
    scan_verb = ["moe_ablm", "scan", *map(str, flags)]
    assert main(scan_verb) == 2
    error = capsys.readouterr().err
    assert "row 2 (line 3): b: nothing chosen" in error and not out.exists()
    assert main([*scan_verb, "--on-bad-row", "skip"]) == 0
    assert "left out 1: nothing chosen" in capsys.readouterr().err
    with out.open() as lines:
        found = list(csv.DictReader(lines))
    assert {line["sequence_id"] for line in found} == {"a"} and len(found) == 19 * 13
    assert found[-1]["number"] == "103" and found[0]["number"] == "93"
    assert main([*scan_verb, "--on-bad-row", "skip", "--positions", "H104"]) == 2
    assert "is there already (other options)" in capsys.readouterr().err
    assert main([*scan_verb[:-1], str(tmp_path / "new.csv"), "--regions", "CDR4"]) == 2
    assert "--regions CDR4: expected some of FRH1" in capsys.readouterr().err
