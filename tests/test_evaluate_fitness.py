"""Zero-shot fitness: ranks, tables of FLAb and ProteinGym, scores, and what is refused."""

import gzip
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from scipy.stats import spearmanr
from tiny_models import HEAVY, LIGHT, engine

from moe_ablm.data.antibody import Antibody
from moe_ablm.data.tokenizer import AMINO_ACIDS
from moe_ablm.errors import UserError
from moe_ablm.evaluation import fitness
from moe_ablm.evaluation.estimates import draw_counts, spearman_number
from moe_ablm.evaluation.fitness import Settings, evaluate, masked_at, substitution_scores
from moe_ablm.evaluation.formats.fitness_tables import Antibodies, Substitutions, read_assays
from moe_ablm.evaluation.formats.members import members
from moe_ablm.evaluation.outcome import Skipped
from moe_ablm.evaluation.subject import Subject
from moe_ablm.inference.scan import scan
from moe_ablm.inference.score import score

WILD = HEAVY[:40]


@pytest.fixture
def subject(tmp_path):
    def made(*paths):
        return Subject(engine(), None, tmp_path / "work", {"fitness": tuple(paths)}, seed=3)

    return made


@pytest.fixture
def table(tmp_path):
    def write(text, name="assay.csv"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def mutated(variant):
    letters = list(WILD)
    for part in variant.split(":"):
        letters[int(part[1:-1]) - 1] = part[-1]
    return "".join(letters)


def variants(n, seed=0):
    """Names of different variants with one to three substitutions."""
    rng, found = np.random.default_rng(seed), {}
    while len(found) < n:
        places = sorted(rng.choice(len(WILD), rng.integers(1, 4), replace=False).tolist())
        news = [rng.choice([a for a in AMINO_ACIDS if a != WILD[p]]) for p in places]
        found[":".join(f"{WILD[p]}{p + 1}{a}" for p, a in zip(places, news, strict=True))] = None
    return list(found)


def gym(names, values):
    lines = [f"{n},{mutated(n)},{v},1" for n, v in zip(names, values, strict=True)]
    return "mutant,mutated_sequence,DMS_score,DMS_score_bin\n" + "\n".join(lines) + "\n"


# ranks


@pytest.mark.parametrize("levels", [3, 10, 1000])
def test_spearman_is_scipys_with_and_without_ties(levels):
    rng = np.random.default_rng(levels)
    x, y = rng.integers(0, levels, (2, 60)).astype(float)
    y = y + x * 0.3
    value = spearman_number(x, y, ["same"] * 60, {}).value
    assert value == pytest.approx(spearmanr(x, y).statistic, rel=1e-12)


def test_a_constant_has_no_correlation():
    number = spearman_number(np.ones(5), np.arange(5.0), list("abcde"), {})
    assert np.isnan([number.value, number.low, number.high]).all()


def test_the_interval_is_that_of_the_draws_and_entries_of_a_unit_go_together():
    rng = np.random.default_rng(1)
    x = rng.standard_normal(12)
    y, units = x + rng.standard_normal(12), [f"u{i // 2:02d}" for i in range(12)]
    number = spearman_number(x, y, units, {}, draws=200)
    counts = draw_counts(tuple(sorted(set(units))), 200).repeat(2, axis=1)
    each = [spearmanr(np.repeat(x, c), np.repeat(y, c)).statistic for c in counts]
    np.testing.assert_allclose([number.low, number.high], np.nanquantile(each, [0.025, 0.975]))
    assert number.low < number.value < number.high and number.n == 12


# tables


def test_the_wild_type_is_found_by_reverting_any_row(table):
    names = variants(20)
    (assay,) = read_assays((table(gym(names, range(20))),))
    assert isinstance(assay, Substitutions) and assay.wild_type.heavy == WILD
    first = [(int(p[1:-1]) - 1, p[0], p[-1]) for p in names[0].split(":")]
    assert list(assay.variants[0]) == first and assay.name == "assay"
    np.testing.assert_array_equal(assay.fitness, np.arange(20))


def test_a_row_may_be_the_wild_type_itself(table):
    text = gym(variants(3), range(3)) + f"WT,{WILD},5,1\n"
    (assay,) = read_assays((table(text),))
    assert assay.variants[3] == () and len(assay.fitness) == 4


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (f"A1?,{WILD},1,1", "row 4 (line 5): column mutant: found 'A1?'"),
        (f"E1A,{WILD},1,1", "row 4 (line 5): column mutant: E1A: residue 1 of mutated_sequence"),
        (f"W1E,{WILD},1,1", "reverted residue 1 of the wild type is W, but E in row 1"),
        (f"E1A:E1C,A{WILD[1:]},1,1", "E1A:E1C: residue 1 is substituted twice"),
        (f"E99A,{WILD},1,1", "the sequence has 40 residues"),
        (f"WT,{WILD}A,1,1", "41 residues, but 40 in row 1"),
        (f"WT,{WILD},inf,1", "column DMS_score: found 'inf', expected a number"),
        (f"WT,{'ACGT' * 10},1,1", "column mutated_sequence: nucleotides"),
        (f"WT,{WILD[:-1]}*,1,1", "column mutated_sequence: '*' at residue 40"),
        (f"WT,{WILD},1", "found 3 columns, expected 4"),
        (f'WT,"{WILD}"x,1,1', "wrong quoting"),
    ],
)
def test_a_malformed_substitution_names_row_and_column(table, line, told):
    path = table(gym(variants(3), range(3)) + line + "\n")
    with pytest.raises(UserError) as error:
        list(read_assays((path,)))
    assert told in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value) and "--on-bad-row=skip" in str(error.value)
    (assay,) = read_assays((path,), "skip")
    assert len(assay.fitness) == 3 and len(assay.left_out) == 1


@pytest.mark.parametrize("word", ["", "NA", "nan", "None"])
def test_rows_without_a_value_are_left_out_with_a_note(subject, table, word):
    names = variants(6)
    gyms = gym(names, [1, word, 3, word, 5, 6]) + f"WT,{word},1,1\n"
    flab = f"heavy,light,fitness\n{HEAVY},{word},1\n{HEAVY},{LIGHT},{word}\n{word},,2\n"
    (assay,) = read_assays((table(gyms),))
    assert assay.fitness.tolist() == [1, 3, 5, 6]
    assert assay.left_out == (
        "assay: 2 rows left out: no DMS_score",
        "assay: 1 row left out: no sequence",
    )
    (antibodies,) = read_assays((table(flab, "flab.csv"),))
    assert [(a.heavy, a.light) for a in antibodies.antibodies] == [(HEAVY, "")]
    assert len(antibodies.left_out) == 2
    notes = evaluate(subject(table(gyms)), Settings()).notes
    assert "assay: 2 rows left out: no DMS_score" in notes


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no header line"),
        ("heavy,light,fitness\n", "no rows below the header"),
        ("mutant,mutated_sequence,DMS_score\n", "no rows below the header"),
        ("heavy,light,kd\nEV,DI,1\n", "no column fitness; found columns 'heavy', 'light', 'kd'"),
        ("mutant,DMS_score\nA1C,1\n", "no column mutated_sequence"),
        ("sequence,fitness\nEV,1\n", "neither heavy, light, fitness"),
        ("heavy,light,fitness\n,,1\n", "1 rejected: no sequence (first: row 1 (line 2))"),
        ("heavy,light,fitness\nEV1,DI,1\n", "column heavy: '1' at residue 3"),
        ("heavy,light,fitness\nEV,DI,inf\n", "column fitness: found 'inf'"),
        ("heavy,light,fitness,fitness\nEV,DI,1,2\n", "column fitness occurs 2 times"),
        ("heavy,light,fitness\n" + "E" * 2_000_000, "more than 1048576 characters"),
    ],
)
def test_a_table_that_is_none_is_refused_in_a_line(table, text, told):
    with pytest.raises(UserError, match="assay.csv") as error:
        list(read_assays((table(text),)))
    assert told in str(error.value) and "\n" not in str(error.value)


def test_flab_with_other_columns_single_chains_and_nanobodies(table):
    flab = table("Antigen,Light,HEAVY,Kd,fitness\nx,diq,EVQ,2,1.5\nx,,EVQL,3,-2\n", "a.csv")
    vhh = table("VHH_sequence\tfitness\nQVQ\t1\nQVK\t0\n", "b.tsv")
    pair, single = read_assays((flab, vhh))
    assert [(a.heavy, a.light) for a in pair.antibodies] == [("EVQ", "DIQ"), ("EVQL", "")]
    np.testing.assert_array_equal(pair.fitness, [1.5, -2])
    assert isinstance(single, Antibodies) and [a.light for a in single.antibodies] == ["", ""]


@pytest.mark.parametrize("kind", ["plain", "gz", "zip", "tar.gz"])
def test_tables_come_plain_compressed_and_in_archives(tmp_path, table, kind):
    path, text = table("heavy,light,fitness\nEV,DI,1\n", "x.csv"), "heavy,light,fitness\nEV,DI,1\n"
    archive = tmp_path / f"all.{kind}"
    if kind == "plain":
        archive = path
    elif kind == "gz":
        archive = tmp_path / "x.csv.gz"
        archive.write_bytes(gzip.compress(text.encode()))
    elif kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            for name in ("d/x.csv", "__MACOSX/d/._x.csv", "d/.DS_Store"):
                file.writestr(name, text)
    else:
        with tarfile.open(archive, "w:gz") as file:
            file.add(path, "d/x.csv")
    (assay,) = read_assays((archive,))
    assert assay.name == "x" and assay.antibodies[0].heavy == "EV"


def test_tables_of_one_name_are_told_apart_by_their_folder(tmp_path):
    paths = []
    for folder in "ab":
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / "kd.csv")
        paths[-1].write_text("heavy,fitness\nEV,1\n")
    assert [a.name for a in read_assays(tuple(paths))] == ["kd", "b/kd"]


def test_what_could_run_code_or_fill_the_memory_is_refused(tmp_path):
    lmdb = bytes(16) + b"\xde\xc0\xef\xbe" + bytes(100)
    whole = gzip.compress(np.random.default_rng(0).bytes(5000).hex().encode())
    files = {
        "data.mdb": (lmdb, "pickles can run code"),
        "x.pkl": (pickle.dumps([1, 2]), "pickles can run code"),
        "x.bin": (b"a\0b", "not a text file"),
        "cut.gz": (whole[:-2000], "damaged or truncated"),
        "bad.zip": (b"PK\x03\x04" + bytes(50), "damaged or truncated"),
    }
    for name, (content, told) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=told) as error:
            [member.text.read() for member in members(tmp_path / name)]
        assert name in str(error.value) and "\n" not in str(error.value)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for name in "ab":
            file.writestr(name, "A" * 600_000)
    with pytest.raises(UserError, match="decompression bomb"):
        [member.text.read() for member in members(tmp_path / "bomb.zip", largest=1_000_000)]


# scores


def test_marginals_are_those_of_scan():
    wild = Antibody("w", WILD, "")
    (expected,) = scan(engine(), [wild])
    found = masked_at(engine(), wild, [0, 7, 39])
    np.testing.assert_allclose(found[[0, 7, 39]], expected[[0, 7, 39]], atol=1e-5)
    assert np.isnan(found[1]).all()


def test_a_variants_score_is_the_sum_over_its_substitutions():
    wild = Antibody("w", WILD, "")
    first, second = (0, WILD[0], "W"), (9, WILD[9], "C")
    assay = Substitutions("a", wild, ((first,), (second,), (first, second), ()), np.arange(4.0))
    scores = substitution_scores(engine(), assay)
    for rule in ("masked", "wild-type"):
        found = scores[f"{rule} marginal"]
        (odds,) = scan(engine(), [wild], f"{rule}-marginal")
        each = odds[0, AMINO_ACIDS.index("W")], odds[9, AMINO_ACIDS.index("C")]
        np.testing.assert_allclose(found, [*each, sum(each), 0], atol=1e-5)
    np.testing.assert_array_equal(scores["fewer substitutions"], [-1, -1, -2, 0])


def test_fitness_that_is_the_models_is_found_and_shuffled_fitness_is_not(subject, table):
    names = variants(150)
    places = [[(int(p[1:-1]) - 1, AMINO_ACIDS.index(p[-1])) for p in n.split(":")] for n in names]
    (odds,) = scan(engine(), [Antibody("w", WILD, "")])
    truth = np.array([sum(odds[p] for p in each) for each in places], float)
    shuffled = np.random.default_rng(5).permutation(truth)
    paths = table(gym(names, truth), "planted.csv"), table(gym(names, shuffled), "shuffled.csv")
    outcome = evaluate(subject(*paths), Settings())
    found = {(n.labels["assay"], n.labels["score"]): n for n in outcome.numbers}
    assert found["planted", "masked marginal"].value == pytest.approx(1, abs=1e-6)
    assert found["planted", "masked marginal"].low > 0.99
    wrong = found["shuffled", "masked marginal"]
    assert wrong.low < 0 < wrong.high and wrong.n == 150
    assert {s for _, s in found} == {"masked marginal", "wild-type marginal", "fewer substitutions"}
    assert any("negative correlation" in note for note in outcome.notes)
    outcome.pictures[0].draw()


def test_antibodies_are_scored_exactly_once_and_kept(subject, table, monkeypatch):
    pairs = [(HEAVY[:n], LIGHT[: n - 5]) for n in (20, 22, 24)] + [(WILD, "")]
    expected = [float(s.mean()) for s in score(engine(), [Antibody("", *p) for p in pairs])]
    text = "heavy,light,fitness\n" + "".join(f"{h},{x},{i}\n" for i, (h, x) in enumerate(pairs))
    paths = table(text, "one.csv"), table(text, "two.csv")
    asked = []
    monkeypatch.setattr(
        fitness, "score", lambda e, some, **k: asked.extend(some) or score(e, some, **k)
    )
    outcome = evaluate(subject(*paths), Settings())
    rho = spearmanr(expected, range(4)).statistic
    assert [n.value for n in outcome.numbers] == pytest.approx([rho, rho])
    assert len(asked) == 4 and outcome.numbers[0].labels["score"] == "pseudo-log-likelihood (exact)"
    assert evaluate(subject(*paths), Settings()).numbers == outcome.numbers and len(asked) == 4
    quick = evaluate(subject(paths[0]), Settings(rule="one-pass")).numbers
    assert len(asked) == 8 and quick[0].labels["score"] == "pseudo-log-likelihood (one-pass)"


def test_draws_are_noted_and_the_same_for_every_model(subject, table):
    path = table(gym(variants(60), np.arange(60)))
    (assay,) = read_assays((path,))
    some, notes = fitness.drawn(subject(path), assay, Settings(variants=20))
    again, _ = fitness.drawn(subject(path), assay, Settings(variants=20))
    assert some.variants == again.variants and len(some.fitness) == 20
    assert notes == ["assay: 20 of 60 variants drawn"]
    assert all(
        assay.variants[int(f)] == v for f, v in zip(some.fitness, some.variants, strict=True)
    )


def test_what_the_model_cannot_read_is_left_out_with_a_note(subject, table):
    long = "E" * 400
    substituted = table(f"mutant,mutated_sequence,DMS_score\nWT,{long},1\nE1C,C{long[1:]},2\n")
    mixed = f"heavy,light,fitness\n{long},,1\n" + "".join(
        f"{HEAVY[:n]},,{n}\n" for n in (35, 38, 40)
    )
    outcome = evaluate(subject(substituted, table(mixed, "mixed.csv")), Settings())
    assert [n.labels["assay"] for n in outcome.numbers] == ["mixed"] and outcome.numbers[0].n == 3
    assert "its 400 residues are more than the 320 tokens" in outcome.notes[0]
    assert "1 of 4 antibodies are longer" in outcome.notes[1]
    with pytest.raises(Skipped, match="400 residues"):
        evaluate(subject(substituted), Settings())


def test_nothing_to_correlate_and_nothing_given_are_skipped(subject, table):
    same = table("heavy,light,fitness\nEV,DI,1\nEVQ,DI,1\nEVQL,DI,1\n")
    with pytest.raises(Skipped, match="3 variants, 1 different values"):
        evaluate(subject(same), Settings())
    with pytest.raises(Skipped, match="--data fitness=FILE"):
        evaluate(subject(), Settings())
    with pytest.raises(UserError, match="fitness.rule='all': expected one of exact, one-pass"):
        evaluate(subject(same), Settings(rule="all"))
