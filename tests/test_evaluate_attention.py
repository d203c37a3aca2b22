"""Cross-chain attention against tables written by hand and attention that was planted."""

import numpy as np
import pytest
from small_datasets import Record, random_records, write_dataset
from tiny_models import HEAVY, LIGHT, engine, tiny_model

from moe_ablm.data.regions import region_names
from moe_ablm.data.tokenizer import LAYOUTS
from moe_ablm.errors import UserError
from moe_ablm.evaluation import attention as module
from moe_ablm.evaluation.attention import (
    MOST,
    Settings,
    attention_sums,
    cdr_over_fr,
    chain_sums,
    cysteine_over_other,
    evaluate,
    heat_maps,
    named_antibodies,
    random_partners,
    received,
)
from moe_ablm.evaluation.cohort import Chain
from moe_ablm.evaluation.estimates import derived, draw_counts
from moe_ablm.evaluation.outcome import Skipped
from moe_ablm.evaluation.subject import Subject
from moe_ablm.inference.antibodies import given
from moe_ablm.inference.attention import CrossAttention, attention, mean_attention
from moe_ablm.inference.buckets import Engine

RECORDS = random_records(24, seed=0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("attention") / "d", RECORDS, split=2)


def subject(dataset, tmp_path, used=None, **files) -> Subject:
    return Subject(used or engine(), dataset, tmp_path, files)


def plant(monkeypatch, weight):
    """Every residue is given `weight(antibody, is CDR, letters)` by every residue of the other."""
    cdr = {getattr(r, c): getattr(r, f"{c}_cdr") for r in RECORDS for c in ("heavy", "light")}

    def planted(engine, antibodies, layer=None):
        for index, a in enumerate(antibodies):
            keys = [
                weight(a, np.array([x != "0" for x in cdr[chain]]), np.array(list(chain)))
                for chain in (a.heavy, a.light)
            ]
            to_light = np.tile(keys[1], (len(a.heavy), 1))
            to_heavy = np.tile(keys[0], (len(a.light), 1))
            yield index, CrossAttention(to_light.astype("f4"), to_heavy.astype("f4"))

    monkeypatch.setattr(module, "mean_attention", planted)


def found(outcome, metric: str) -> dict:
    return {
        tuple(n.labels.values()): n
        for n in [*outcome.numbers, *(s.number() for s in outcome.samples)]
        if n.metric == metric
    }


def test_uniform_attention_prefers_nothing(monkeypatch, dataset, tmp_path):
    plant(monkeypatch, lambda a, cdr, letters: np.full(len(cdr), 1 / 32))
    outcome = evaluate(subject(dataset, tmp_path), Settings())
    ratios = [n for n in outcome.numbers if n.metric != "cysteine_over_other"]
    assert len(ratios) > 50
    for number in ratios:
        assert (number.value, number.low, number.high) == (1, 1, 1), number
    assert {n.value for n in found(outcome, "attention_per_residue").values()} == {1 / 32}


def test_planted_ratios_are_found(monkeypatch, dataset, tmp_path):
    """CDRs get 3 a residue, cysteines of frameworks 2 and others 1."""
    plant(monkeypatch, lambda a, cdr, letters: np.where(cdr, 3.0, 1.0) + (~cdr & (letters == "C")))
    outcome = evaluate(subject(dataset, tmp_path), Settings())
    total = {kind: np.zeros(2) for kind in ("cdr", "fr", "c", "other")}
    for r in RECORDS:
        for letters, mask in ((r.heavy, r.heavy_cdr), (r.light, r.light_cdr)):
            for letter, region in zip(letters, mask, strict=True):
                weight = 3.0 if region != "0" else 2.0 if letter == "C" else 1.0
                total["cdr" if region != "0" else "fr"] += weight, 1
                total["c" if letter == "C" else "other"] += weight, 1
    mean = {kind: a / n for kind, (a, n) in total.items()}
    whole = np.divide(*(total["cdr"] + total["fr"]))
    key = ("both", "native")
    assert found(outcome, "cdr_over_fr")[key].value == pytest.approx(mean["cdr"] / mean["fr"])
    assert found(outcome, "cdr_over_all")[key].value == pytest.approx(mean["cdr"] / whole)
    # the published form: share of attention over share of residues
    share = total["cdr"] / (total["cdr"] + total["fr"])
    assert found(outcome, "cdr_over_all")[key].value == pytest.approx(share[0] / share[1])
    cysteines = found(outcome, "cysteine_over_other")[key]
    assert cysteines.value == pytest.approx(mean["c"] / mean["other"])
    assert cysteines.low < cysteines.value < cysteines.high
    each = found(outcome, "each_cdr_over_fr")
    assert {name for name, _ in each} == {n for n in region_names() if n.startswith("CDR")}
    for number in each.values():
        assert number.value == pytest.approx(3 / mean["fr"])


def test_what_native_partners_add_is_told_from_what_cdrs_always_get(monkeypatch, dataset, tmp_path):
    native = {(r.heavy, r.light) for r in RECORDS}

    def weight(a, cdr, letters):
        return np.where(cdr, 6.0 if (a.heavy, a.light) in native else 2.0, 1.0)

    plant(monkeypatch, weight)
    outcome = evaluate(subject(dataset, tmp_path), Settings())
    ratios = found(outcome, "cdr_over_fr")
    for direction in ("both", "light to heavy", "heavy to light"):
        assert ratios[direction, "native"].value == pytest.approx(6)
        assert ratios[direction, "random"].value == pytest.approx(2)
        gain = found(outcome, "native_over_random")[(direction,)]
        assert (gain.value, gain.low, gain.high) == pytest.approx((3, 3, 3))


def test_directions_are_those_of_the_chain_that_receives(monkeypatch, dataset, tmp_path):
    heavy = {r.heavy for r in RECORDS}

    def weight(a, cdr, letters):
        return np.where(cdr & ("".join(letters) in heavy), 4.0, 1.0)

    plant(monkeypatch, weight)
    ratios = found(evaluate(subject(dataset, tmp_path), Settings()), "cdr_over_fr")
    assert ratios["light to heavy", "native"].value == pytest.approx(4)
    assert ratios["heavy to light", "native"].value == pytest.approx(1)


def test_sums_by_hand():
    chain = Chain("ACDC", "ACDC", np.array([1, 1, 2, 0], np.uint8), *(np.zeros(4, np.uint8),) * 2,
                  "", "")  # fmt: skip
    to_heavy = np.array([[0.1, 0.2, 0.3, 0.1], [0.3, 0.0, 0.1, 0.1]], np.float32)
    to_light = np.array([[0.25, 0.5]] * 4, np.float32)
    heavy, light = received(CrossAttention(to_light, to_heavy))
    np.testing.assert_allclose(heavy, [0.2, 0.1, 0.2, 0.1], atol=1e-7)
    np.testing.assert_allclose(light, [0.25, 0.5])
    table = chain_sums(chain, np.array([0.2, 0.1, 0.3, 0.5]))
    np.testing.assert_allclose(table[0], [[0, 0], [0.5, 1]])
    np.testing.assert_allclose(table[1], [[0.2, 1], [0.1, 1]])
    np.testing.assert_allclose(table[2], [[0.3, 1], [0, 0]])
    assert table.sum() == pytest.approx(1.1 + 4)
    both = np.stack([table, np.zeros_like(table)])
    assert cdr_over_fr(both, (0,)) == pytest.approx(0.3 / 0.15)
    # residues without a region are neither, but cysteines of them count
    assert cysteine_over_other(both, (0,)) == pytest.approx(0.3 / 0.25)
    assert np.isnan(cdr_over_fr(both, (1,)))


def test_means_are_those_of_all_heads():
    pairs = given([("EVQLVES", "DIQM"), ("EVQ", "DI")], LAYOUTS["esm"], 64)
    by_layer = [attention(engine(), pairs, layer) for layer in (0, 1)]
    last, whole = (dict(mean_attention(engine(), pairs, layer)) for layer in (-1, None))
    for i in range(2):
        for d in range(2):
            heads = [found[i][d].mean(0) for found in by_layer]
            np.testing.assert_allclose(last[i][d], heads[1], atol=1e-6)
            np.testing.assert_allclose(whole[i][d], np.mean(heads, 0), atol=1e-6)
    with pytest.raises(UserError, match="expected 0 to 1"):
        list(mean_attention(engine(), pairs, 2))


def test_the_model_is_asked_about_the_pairs(dataset, tmp_path):
    """Sums of real weights by a loop over residues, native and with the partners drawn."""
    members, _ = subject(dataset, tmp_path).antibodies(6, paired=True)
    partner = random_partners(np.random.default_rng(1), 6)
    sums = attention_sums(engine(), members, partner, 0)
    for i, j in enumerate(partner):
        chains = members[i].heavy, members[j].light
        pair = given([(chains[0].letters, chains[1].letters)], LAYOUTS["esm"], 64)
        weights = attention(engine(), pair, 0)[0]
        for c, (row, towards) in enumerate(
            ((i, weights.light_to_heavy), (j, weights.heavy_to_light))
        ):
            expected = np.zeros((8, 2, 2))
            for k, letter in enumerate(chains[c].letters):
                cell = expected[chains[c].region[k], int(letter == "C")]
                cell += towards[:, :, k].mean(), 1
            np.testing.assert_allclose(sums[row, c], expected, atol=1e-6)


def test_partners_are_random_and_never_ones_own():
    for n in (2, 3, 50):
        partner = random_partners(np.random.default_rng(n), n)
        assert sorted(partner) == list(range(n)) and (partner != np.arange(n)).all()
    drawn = {tuple(random_partners(np.random.default_rng(i), 4)) for i in range(40)}
    assert len(drawn) == 6  # all 3! cycles of four


def test_the_same_numbers_again_and_a_sum_of_shares_below_one(dataset, tmp_path):
    first, second = (evaluate(subject(dataset, tmp_path), Settings(layer=0)) for _ in range(2))
    assert first.numbers == second.numbers
    for share in found(first, "cross_chain_share").values():
        assert 0 < share.value < 1
    figure = first.pictures[0].draw()
    assert [axis.get_xlabel() for axis in figure.axes] == ["", ""]


def test_intervals_are_those_of_sums_drawn_again():
    rng = np.random.default_rng(0)
    sums, units = rng.uniform(1, 2, (30, 2)), [str(i % 20) for i in range(30)]
    number = derived("m", units, sums, lambda s: s[..., 0] / s[..., 1], {}, draws=200)
    names = sorted(set(units))
    by_hand = []
    for counts in draw_counts(tuple(names), 200):
        times = [counts[names.index(unit)] for unit in units]
        drawn = np.repeat(sums, times, axis=0).sum(0)
        by_hand.append(drawn[0] / drawn[1])
    assert number.value == pytest.approx(sums[:, 0].sum() / sums[:, 1].sum())
    assert (number.low, number.high) == pytest.approx(tuple(np.quantile(by_hand, [0.025, 0.975])))
    assert np.isnan(derived("m", ["a", "a"], sums[:2], lambda s: s[..., 0], {}).low)


def test_single_chains_are_skipped(tmp_path):
    alone = write_dataset(tmp_path / "d", [Record(r.heavy, "", r.heavy_cdr) for r in RECORDS], 2)
    with pytest.raises(Skipped, match="holds no pair"):
        evaluate(subject(alone, tmp_path), Settings())


def test_without_regions_it_is_skipped(tmp_path):
    bare = write_dataset(tmp_path / "d", [Record(r.heavy, r.light) for r in RECORDS], 2)
    with pytest.raises(Skipped, match="no regions"):
        evaluate(subject(bare, tmp_path), Settings())


def test_one_pair_has_no_random_partner(dataset, tmp_path):
    outcome = evaluate(subject(dataset, tmp_path), Settings(antibodies=1))
    assert "one pair only: no random partners" in outcome.notes
    assert not found(outcome, "native_over_random")
    assert {n.labels["partner"] for n in outcome.numbers} == {"native"}
    outcome.pictures[0].draw()


def test_native_and_random_are_of_the_same_residues(monkeypatch, dataset, tmp_path):
    """What has no random partner prefers CDRs most, and has no part in the quotient."""
    longest = max(len(r.heavy) + len(r.light) for r in RECORDS)
    tight = Engine(tiny_model(length=longest + 2))  # a token or two short for some random pairs
    members, _ = subject(dataset, tmp_path, tight).antibodies(100, paired=True)
    drawn = random_partners(subject(dataset, tmp_path).generator("random partners"), len(members))
    alone = {
        letters
        for i, j in enumerate(drawn)
        if len(members[i].heavy) + len(members[j].light) + 4 > longest + 2
        for letters in (members[i].heavy.letters, members[j].light.letters)
    }
    assert 0 < len(alone) < len(members)
    plant(
        monkeypatch,
        lambda a, cdr, letters: np.where(cdr, 9.0 if "".join(letters) in alone else 2.0, 1.0),
    )
    outcome = evaluate(subject(dataset, tmp_path, tight), Settings())
    for number in found(outcome, "native_over_random").values():
        assert (number.value, number.low, number.high) == pytest.approx((1, 1, 1))
    assert found(outcome, "cdr_over_fr")["both", "native"].value > 2


def test_random_pairs_that_are_too_long_are_left_out(tmp_path):
    short = random_records(6, 1, 9, 9) + random_records(6, 2, 16, 16)
    mixed = [Record(a.heavy, b.light, a.heavy_cdr, b.light_cdr)
             for a, b in zip(short, reversed(short), strict=True)]  # fmt: skip
    mixed = write_dataset(tmp_path / "d", mixed, 2)
    tight = Engine(tiny_model(length=9 + 16 + 4))  # cls, two between, eos
    outcome = evaluate(subject(mixed, tmp_path, tight), Settings())
    assert any("pairs with a random partner are too long" in note for note in outcome.notes)


def therapeutic(path, rows: int = 1):
    lines = ["Therapeutic,Format,Heavy Sequence,Light Sequence"]
    lines += [f"Mab {i},IgG,{HEAVY},{LIGHT}" for i in range(rows)]
    path.write_text("\n".join([*lines, f"Nano,VHH,{HEAVY},"]))
    return path


def test_heat_maps_of_named_antibodies(tmp_path):
    pictures, notes = heat_maps(
        subject(None, tmp_path, therapeutic=(therapeutic(tmp_path / "mabs.csv"),))
    )
    assert len(pictures) == 1 and pictures[0].name.startswith("heatmap-Mab_0-")
    assert notes == ["mabs.csv: 1 row left out: one chain only"]
    figure = pictures[0].draw()
    left = figure.axes[0]
    assert [t.get_text() for t in left.get_yticklabels()] == ["CDRH1", "CDRH2", "CDRH3"]
    assert [t.get_text() for t in left.get_xticklabels()] == ["CDRL1", "CDRL2", "CDRL3"]
    assert left.images[0].get_array().shape == (len(HEAVY), len(LIGHT))
    antibodies = given([(HEAVY, LIGHT)], LAYOUTS["esm"], 320)
    by_layer = [attention(engine(), antibodies, layer)[0].heavy_to_light for layer in (0, 1)]
    np.testing.assert_allclose(left.images[0].get_array(), np.mean(by_layer, (0, 1)), atol=1e-6)


def test_heat_maps_of_any_format_and_not_too_many(tmp_path):
    table = tmp_path / "pairs.csv"
    table.write_text("name,heavy,light\nodd,EVQLVES,DIQM\n")
    many = therapeutic(tmp_path / "many.csv", MOST)
    pictures, notes = heat_maps(subject(None, tmp_path, therapeutic=(table, many)))
    assert len(pictures) == MOST
    assert f"heat maps of the first {MOST} of {MOST + 1} named antibodies" in notes
    assert "odd: no V domain was recognised: CDRs are not marked" in notes


def test_without_a_file_there_are_no_heat_maps_but_the_rest(dataset, tmp_path):
    outcome = evaluate(subject(dataset, tmp_path), Settings())
    assert len(outcome.pictures) == 1
    assert "no heat maps: no file was given (--data therapeutic=FILE)" in outcome.notes


def test_files_of_another_kind_are_refused(tmp_path):
    proteins = tmp_path / "p.fasta"
    proteins.write_text(">sp|P1|x\nMKV\n")
    with pytest.raises(UserError, match="therapeutic=.*proteins"):
        heat_maps(subject(None, tmp_path, therapeutic=(proteins,)))
    table = tmp_path / "t.csv"
    table.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="t.csv: no column"):
        heat_maps(subject(None, tmp_path, therapeutic=(table,)))


def test_the_antibodies_of_the_figure(shared_data, tmp_path):
    found, notes = named_antibodies(
        subject(None, tmp_path), (shared_data / "therapeutic_mabs.csv",)
    )
    assert [a.name for a in found] == [
        "Bamlanivimab", "Bebtelovimab", "Cilgavimab", "Masavibart", "Regdanvimab"
    ]  # fmt: skip
    assert not notes
