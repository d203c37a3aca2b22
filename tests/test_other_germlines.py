"""Annotation by germlines of a folder, and by those of several that fit best.

The other species is made up: codons of human V genes are drawn anew, but where the domain is kept
by them (C23, W41, C104), so that its domains are none by human germlines.
"""

import copy
import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pytest
from public_headers import coded
from test_annotate import ADALIMUMAB_VH, ADALIMUMAB_VL, TRASTUZUMAB_VH, TRASTUZUMAB_VL
from tiny_models import tiny_model

import moe_ablm
from moe_ablm.__main__ import main
from moe_ablm.data.annotate import annotate_batch, annotate_chains, chains_of
from moe_ablm.data.antibody import Antibody
from moe_ablm.data.germline import HUMAN, VAllele, load_germlines
from moe_ablm.data.numbering import number_chains
from moe_ablm.data.positions import selection
from moe_ablm.data.readers import Reading, open_sources
from moe_ablm.data.readers.nucleotides import v_domains
from moe_ablm.data.regions import region_names
from moe_ablm.data.tokenizer import LAYOUTS
from moe_ablm.errors import ArgumentError, UserError
from moe_ablm.inference.antibodies import read
from moe_ablm.inference.look import completions, look
from moe_ablm.inference.numbers import nothing_chosen, numbered_labels, regions
from moe_ablm.interop.saved import save_model

LOCI = ("IGH", "IGK", "IGL")
HUMANS = [(TRASTUZUMAB_VH, TRASTUZUMAB_VL), (ADALIMUMAB_VH, ADALIMUMAB_VL)]


def gapped(allele: VAllele, rng: np.random.Generator, share: float) -> str:
    """The V gene with that share of codons drawn anew, with IMGT's gaps."""
    codons = ["..."] * int(allele.imgt[-1])
    for i, (position, residue) in enumerate(zip(allele.imgt, allele.amino_acids, strict=True)):
        codon = allele.nucleotides[3 * i : 3 * i + 3]
        if position not in (23, 41, 104) and rng.random() < share:
            codon = coded(str(rng.choice([r for r in "ADEGKLNPQRSTVY" if r != residue])))
        codons[position - 1] = codon
    return "".join(codons)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A folder of germlines: 12 V genes of each locus, and the human J genes."""
    folder, rng = tmp_path_factory.mktemp("germlines") / "dragon", np.random.default_rng(1)
    folder.mkdir()
    human = load_germlines()
    for locus in LOCI:
        genes = {v.gene: v for v in human.v_of(locus)}
        chosen = [genes[name] for name in sorted(genes)[:12]]
        records = [(v.name, gapped(v, rng, 0.7)) for v in chosen]
        records += [(j.name, j.nucleotides) for j in human.j_of(locus)]
        # names as IMGT has them, among other things, and lines of 60
        lines = [
            f">X1|{name}|Draco|F|\n" + "\n".join(s[i : i + 60] for i in range(0, len(s), 60)) + "\n"
            for name, s in records
        ]
        (folder / f"{locus}.fasta").write_text("".join(lines))
    return str(folder)


@pytest.fixture(scope="module")
def domains(other):
    """(sequence, gene, V before the CDR3) of a domain of each V gene, by chain."""
    germlines, found = load_germlines(other), {}
    for chain, loci in (("heavy", LOCI[:1]), ("light", LOCI[1:])):
        found[chain] = []
        for v in germlines.v_of(*loci):
            j = germlines.j_of(v.locus)[0]
            framework = v.amino_acids[: v.c104 + 1]
            tail = "ARDRGSY" + j.amino_acids[j.motif - 1 :]
            found[chain].append((framework + tail, v.gene, framework))
    return found


def test_the_germlines_of_a_folder_name_its_domains(other, domains):
    for chain, known in domains.items():
        sequences = [sequence for sequence, *_ in known]
        assert all(isinstance(a, str) for a in annotate_chains(sequences, chain))
        for annotation, (sequence, gene, framework) in zip(
            annotate_chains(sequences, chain, other), known, strict=True
        ):
            assert annotation.sequence_aa == sequence
            assert gene in annotation.v_call.split("|")
            assert annotation.germline_aa.startswith(framework)
            assert annotation.v_identity_aa == 1.0
        (numbering, *_) = number_chains(sequences, chain, germlines=other)
        allele = next(v for v in load_germlines(other).v if v.gene == known[0][1])
        expected = [str(n) for n in allele.imgt[: allele.c104 + 1]]
        assert [n for n in numbering.numbers[: len(expected)] if int(n) in (23, 41, 104)] == [
            n for n in expected if int(n) in (23, 41, 104)
        ]


def test_of_several_germlines_those_that_fit_an_antibody_best_are_taken(other, domains):
    heavy, light = ([sequence for sequence, *_ in domains[c]] for c in ("heavy", "light"))
    pairs = [*HUMANS, *zip(heavy, light, strict=False), (heavy[0], ""), ("", HUMANS[0][1])]
    pairs += [("", ""), (heavy[1][40:], light[0]), (heavy[2][:60], "")]
    columns = map(pa.array, zip(*pairs, strict=True))
    batch = pa.record_batch(list(columns), ["sequence_aa_heavy", "sequence_aa_light"])
    done, rejected = annotate_batch(batch, germlines=(HUMAN, other))
    assert rejected == {"no_sequence": 1, "heavy: truncated_start": 1, "heavy: truncated_end": 1}
    fitting = ["human", "human", *["dragon"] * (len(heavy) + 1), "human"]
    assert done["germlines"].to_pylist() == fitting
    # as if each had been annotated alone, and by one set of germlines
    for name in (HUMAN, other):
        rows = [i for i, called in enumerate(fitting) if name.endswith(called)]
        alone, _ = annotate_batch(batch.take(pa.array(rows)), germlines=(name,))
        assert alone.equals(done.take(pa.array(rows)).drop_columns(["germlines"]))
    turned, _ = annotate_batch(batch, germlines=(other, HUMAN))
    assert turned.equals(done)
    assert annotate_batch(batch.slice(0, 2))[0].equals(
        annotate_batch(batch.slice(0, 2), germlines=(HUMAN,))[0]
    )


def test_what_is_annotated_already_has_no_germlines(other):
    columns = {f"sequence_aa_{c}": [s] for c, s in zip(("heavy", "light"), HUMANS[0], strict=True)}
    done, _ = annotate_batch(pa.record_batch(columns))
    again, _ = annotate_batch(done, germlines=(other, HUMAN))
    assert again["germlines"].to_pylist() == [""]
    assert again["v_gene_heavy"].equals(done["v_gene_heavy"])
    once_more, _ = annotate_batch(done, germlines=(other, HUMAN), reannotate=True)
    assert once_more["germlines"].to_pylist() == ["human"]


def test_readers_find_chains_and_domains_by_them(other, domains):
    heavy, light = domains["heavy"][0][0], domains["light"][0][0]
    both = [heavy, light, HUMANS[0][0], "A" * 120]
    assert chains_of(both) == ["", "", "heavy", ""]
    assert chains_of(both, (HUMAN, other)) == ["heavy", "light", "heavy", ""]
    reads = ["CC" + coded(heavy), coded(light)]
    assert [domain for domain, _ in v_domains(reads, ["", ""])] == ["", ""]
    assert v_domains(reads, ["", ""], germlines=(other,)) == [(heavy, ""), (light, "")]


def test_a_folder_without_light_chains_leaves_them_human(tmp_path, other, domains):
    folder = tmp_path / "heavy"
    folder.mkdir()
    (folder / "h.fa").write_text(Path(other, "IGH.fasta").read_text())
    (vl,) = annotate_chains([TRASTUZUMAB_VL], "light", str(folder))
    assert vl == annotate_chains([TRASTUZUMAB_VL], "light")[0]
    (vh,) = annotate_chains([domains["heavy"][3][0]], "heavy", str(folder))
    assert vh.v_identity_aa == 1.0
    assert annotate_chains([TRASTUZUMAB_VL], "heavy", str(folder)) == ["wrong_chain"]


def test_the_verbs(tmp_path, other, domains, capsys):
    rows = [*HUMANS, *((h, x) for (h, *_), (x, *_) in zip(*domains.values(), strict=False))]
    text = "heavy,light,species\n" + "".join(f"{h},{x},dragon\n" for h, x in rows)
    (tmp_path / "a.csv").write_text(text)
    given = ["--input", str(tmp_path / "a.csv"), "--germlines", f"human,{other}", "--workers", "1"]
    out, tsv, report = (tmp_path / name for name in ("o.csv", "o.tsv", "r.json"))
    verb = ["moe_ablm", "annotate", *given]
    assert main([*verb, "--out", str(out), "--numbering", "imgt", "--report", str(report)]) == 0
    (source,) = json.loads(report.read_text())["sources"]
    assert {note["reason"]: note["rows"] for note in source["notes"]} == {
        "germlines that fit best: human": 2,
        "germlines that fit best: dragon": 12,
    }
    found = pacsv.read_csv(out).to_pylist()
    assert [row["germlines"] for row in found] == ["human"] * 2 + ["dragon"] * 12
    assert all(row["numbers_heavy"].split(" ")[:3] == ["1", "2", "3"] for row in found)
    assert main([*verb, "--out", str(tsv)]) == 0
    table = pacsv.read_csv(tsv, parse_options=pacsv.ParseOptions(delimiter="\t")).to_pylist()
    assert Counter(row["germlines"] for row in table) == {"human": 4, "dragon": 24}
    assert main(["moe_ablm", "prepare", *given, "--out", str(tmp_path / "d")]) == 0
    assert (tmp_path / "d" / "dataset.json").read_text().count(other) == 1
    capsys.readouterr()
    wrong = ["annotate", *given[:2], "--germlines", "mouse", "--out", str(tmp_path / "n.csv")]
    assert main(["moe_ablm", *wrong]) == 2
    refusal = capsys.readouterr().err
    assert "--germlines mouse: no such folder: only human germlines" in refusal
    assert "ogrdb.airr-community.org" in refusal and "docs/annotation.md" in refusal
    # chains on the command line that no germlines are needed for
    asked = ["embed", "--run", str(tmp_path), "--heavy", HUMANS[0][0], "--germlines", "mouse"]
    assert main(["moe_ablm", *asked]) == 2
    assert "--germlines mouse: no such folder" in capsys.readouterr().err


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_verbs_that_ask_a_model_number_by_them(tmp_path, other, domains, capsys):
    save_model(tiny_model(), tmp_path / "run")
    (heavy, v_gene, framework), (light, *_) = domains["heavy"][2], domains["light"][5]
    rows = {"human": HUMANS[0], "dragon": (heavy, light)}
    text = "".join(f"{name},{h},{x}\n" for name, (h, x) in rows.items())
    (tmp_path / "a.csv").write_text("id,heavy,light\n" + text)
    given = ["--run", str(tmp_path / "run"), "--input", str(tmp_path / "a.csv")]
    out = ["--out", str(tmp_path / "out.csv")]
    score = ["moe_ablm", "score", *given, "--level", "residue", "--one-pass", *out]
    several = ["--germlines", f"human,{other}"]
    assert main([*score, *several]) == 0
    lines = lines_of(tmp_path / "out.csv")
    human, dragon = ([x for x in lines if x["sequence_id"] == name] for name in rows)
    people, monster = Antibody("human", *HUMANS[0]), Antibody("dragon", heavy, light)
    by_human = numbered_labels([people, monster], "imgt")
    assert [line["number"] for line in human] == by_human["number"][: len(human)]
    assert set(by_human["number"][len(human) :]) == set(by_human["region"][len(human) :]) == {""}
    # framework residues have the positions that the gaps of the V gene give them
    (allele,) = (v for v in load_germlines(other).v if v.gene == v_gene)
    assert all(line["number"] and line["region"] for line in dragon)
    for line, position in zip(dragon, allele.imgt[: len(framework)].tolist(), strict=False):
        if line["region"].startswith("FR"):
            assert line["number"] == str(position)
    assert main(score) == 2
    assert "is there already (other reading)" in capsys.readouterr().err

    selected = selection(None, "H104", "imgt")
    assert selected and nothing_chosen(monster, selected) and not nothing_chosen(people, selected)
    scan = ["moe_ablm", "scan", *given, "--method", "wild-type-marginal", "--positions", "H104"]
    assert main([*scan, *several, "--out", str(tmp_path / "all.csv")]) == 0
    found = lines_of(tmp_path / "all.csv")
    assert Counter(line["sequence_id"] for line in found) == dict.fromkeys(rows, 19)
    assert {(line["residue"], line["number"]) for line in found} == {("C", "104")}

    labels = numbered_labels([monster], "imgt", (other,))
    assert [line["number"] for line in dragon] == labels["number"]
    (cells,) = regions([monster], (HUMAN, other))
    assert (cells >= 0).all() and (regions([monster])[0] == -1).all()


def test_a_model_in_python_does_as_the_verbs(tmp_path, other, domains):
    """Told apart, numbered and chosen by the germlines that it is loaded with."""
    save_model(tiny_model(), tmp_path / "run")
    (heavy, *_), (light, *_) = domains["heavy"][2], domains["light"][5]
    model = moe_ablm.load(tmp_path / "run", germlines=[HUMAN, other])
    human = moe_ablm.load(tmp_path / "run")
    pair, frame = (heavy, light), pa.table({"heavy": [heavy], "light": [light]})
    named = f"perplexity_{region_names()[0]}"
    assert np.isfinite(model.score(pair, one_pass=True, by_region=True)[named]).all()
    assert np.isnan(human.score(pair, one_pass=True, by_region=True)[named]).all()
    numbers = numbered_labels([Antibody("a", heavy, light)], "imgt", (other,))["number"]
    lines = model.score(frame, level="residue", one_pass=True)
    assert lines["number"].to_pylist() == numbers
    at = numbers.index("104")
    (scanned,) = model.scan(pair, "wild-type-marginal", positions="H104")
    assert np.flatnonzero(np.isfinite(scanned).any(1)).tolist() == [at]
    mutants = model.scan(frame, "wild-type-marginal", positions="H104")
    assert set(mutants["number"].to_pylist()) == {"104"} and len(mutants) == 19
    assert [f["place"] for f in model.infill(pair, positions="H104")[0]["filled"]] == [at]
    with pytest.raises(UserError, match="H104|positions"):
        human.scan(pair, "wild-type-marginal", positions="H104")
    seen = look(model, Antibody("a", heavy, light), "imgt", one_pass=True)
    assert seen.labels["number"] == numbers
    assert len(completions(model, Antibody("a", heavy, light), "H104", "imgt", 0)) == 1
    # a single chain that is a light one by them
    for asked, chain in ((model, "light"), (human, "heavy")):
        assert np.isfinite(asked.score(light, one_pass=True)[f"perplexity_{chain}"]).all()
    with pytest.raises(UserError, match="^germlines='mouse': no such folder: only human"):
        moe_ablm.load(tmp_path / "run", germlines="mouse")


def test_refusals_of_workers_arrive(other):
    """They are carried from one process to another."""
    with pytest.raises(ArgumentError) as error:
        load_germlines(f"{other}/nowhere")
    again = copy.copy(error.value)  # as pickle does it
    assert (str(again), again.in_python) == (str(error.value), error.value.in_python)


def test_verbs_that_ask_a_model_tell_chains_by_them(tmp_path, other, domains):
    (heavy, *_), (light, *_) = domains["heavy"][0], domains["light"][0]
    fasta = tmp_path / "a.fasta"
    fasta.write_text(f">a\n{light}\n>b\n{heavy}\n>c\n{HUMANS[0][1]}\n")
    for germlines, chains in (((HUMAN, other), "lhl"), ((HUMAN,), "hhl")):
        (source,) = open_sources([str(fasta)], reading=Reading(germlines=germlines))
        antibodies = list(read([source], LAYOUTS["esm"], 400))
        assert "".join("h" if a.heavy else "l" for a in antibodies) == chains
