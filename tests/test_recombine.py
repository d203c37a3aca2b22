import numpy as np
import pytest

from moe_ablm.data.germline import DAllele, JAllele, VAllele
from moe_ablm.data.recombine import JunctionParams, Recombiner, place

# V: E, C104, then GCG A; J: one base, Y, W118, G, then one base; D: one allele.
V = VAllele("IGHV0*01", "GAGTGTGCGA", "ECA", np.array([103, 104, 105], np.int16), c104=1)
J = JAllele("IGHJ0*01", "CTACTGGGGCC", frame=1, amino_acids="YWG", motif=1)
D = DAllele("IGHD0*01", "GGTTCC")
LETTERS = np.frombuffer(b"ACGT-", np.uint8)
SEGMENTS = np.frombuffer(b"VNDJ", np.uint8)


def recombiner(cuts: dict[str, int], cdr3_length=(1, 40)) -> Recombiner:
    """A recombiner of V, D and J whose cuts and additions are fixed; N nucleotides are all A."""
    none = (0.0, 1.0)
    params = JunctionParams(none, none, none, n_composition=(1, 0, 0, 0), cdr3_length=cdr3_length)
    made = Recombiner([V], [D], [J], params, np.ones(1))
    made._draw = lambda name, rng, shape: np.full(shape, cuts.get(name, 0))
    return made


def recombine_one(made: Recombiner, width: int = 12):
    zero = np.zeros(1, np.int64)
    return made.recombine(zero, zero, np.zeros(1), width, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("cuts", "nucleotides", "segments"),
    [
        (
            {"n1": 1},
            "GAGTGT" + "GCGA" + "A" + "GGTTCC" + "CTAC" + "TGGGGC",
            "VV" + "VNDDJ" + "JJ",
        ),
        # GC | AA | TT | AAAA | AC: GCA ATT AAA AAC
        (
            {"v_trim": 2, "n1": 2, "d5_trim": 2, "d3_trim": 2, "n2": 4, "j_trim": 2},
            "GAGTGT" + "GC" + "AA" + "TT" + "AAAA" + "AC" + "TGGGGC",
            "VV" + "VDNJ" + "JJ",
        ),
        # nothing of V, D and J is left in the junction
        (
            {"v_trim": 9, "n1": 4, "d5_trim": 3, "d3_trim": 9, "n2": 2, "j_trim": 9},
            "GAGTGT" + "AAAAAA" + "TGGGGC",
            "VV" + "NN" + "JJ",
        ),
    ],
)
def test_junction_made_by_hand(cuts, nucleotides, segments):
    cells = recombine_one(recombiner(cuts))
    length = cells.length[0]
    assert LETTERS[cells.codes[0]].tobytes().decode() == nucleotides.ljust(36, "-")
    assert SEGMENTS[cells.segment[0, :length]].tobytes().decode() == segments
    assert cells.cdr3[0].tolist() == [2, length - 2]
    assert cells.d[0] == (-1 if cuts.get("d3_trim") == 9 else 0)


def test_a_junction_out_of_frame_is_never_kept():
    # GCGA + GGTTCC + CTAC are 14 nucleotides
    with pytest.raises(RuntimeError, match="no productive junction"):
        recombine_one(recombiner({}))


def test_stop_codons_are_never_kept():
    # untrimmed, the V allele goes on with TAA; N nucleotides make stops of all three kinds
    v = VAllele("IGHV0*01", "GAGTGTTAAGCT", "EC*A", np.array([103, 104, 105, 106], np.int16), 1)
    none = (0.0, 1.0)
    params = JunctionParams((2.0, 2.0), none, (3.0, 2.0), cdr3_length=(1, 40))
    made = Recombiner([v], [], [J], params)
    n = 500
    zero = np.zeros(n, np.int64)
    cells = made.recombine(zero, zero, np.zeros(n), 60, np.random.default_rng(0))
    letters = LETTERS[cells.codes].tobytes().decode()
    rows = [letters[i : i + 180].rstrip("-") for i in range(0, len(letters), 180)]
    codons = {row[i : i + 3] for row in rows for i in range(0, len(row), 3)}
    assert all(len(row) % 3 == 0 for row in rows)
    assert not codons & {"TAA", "TAG", "TGA"}
    assert len(codons) > 30


def test_cdr3_lengths_keep_their_bounds_and_selection_shortens():
    params = JunctionParams((1.0, 1.0), (1.0, 1.0), (30.0, 3.0), cdr3_length=(8, 16))
    made = Recombiner([V], [], [J], params)
    n = 2000
    zero = np.zeros(n, np.int64)
    lengths = []
    for selection in (0.0, 1.0):
        rng = np.random.default_rng(0)
        cells = made.recombine(zero, zero, np.full(n, selection), 60, rng)
        lengths.append(np.diff(cells.cdr3, axis=1)[:, 0])
    assert lengths[0].min() == 8 and lengths[0].max() == 16
    # exp(-1) for each residue above 12 against the same histogram without selection
    shares = [np.bincount(x, minlength=17)[8:] / n for x in lengths]
    expected = shares[0] * np.exp(-np.maximum(np.arange(8, 17) - 12, 0))
    np.testing.assert_allclose(shares[1], expected / expected.sum(), atol=0.035)


def test_trimming_and_n_addition_have_the_mean_and_variance_they_are_given():
    params = JunctionParams((1.5, 2.0), (4.0, 1.0), (7.0, 4.0))
    made = Recombiner([V], [], [J], params)
    for name, (mean, dispersion) in (("v_trim", (1.5, 2.0)), ("n1", (7.0, 4.0))):
        drawn = made._draw(name, np.random.default_rng(1), (100_000,))
        assert drawn.mean() == pytest.approx(mean, rel=0.02)
        assert drawn.var() == pytest.approx(mean + mean**2 / dispersion, rel=0.04)


def test_place_copies_ragged_pieces():
    out = np.full((3, 5), -1)
    source = np.arange(10)
    place(out, np.array([0, 2, 4]), source, np.array([3, 0, 9]), np.array([2, 3, 0]))
    assert out.tolist() == [[3, 4, -1, -1, -1], [-1, -1, 0, 1, 2], [-1] * 5]
