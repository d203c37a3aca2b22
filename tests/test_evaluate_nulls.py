"""Null models of routers: what they are, and that nothing is claimed of what knows no region."""

import math

import error_rates
import numpy as np
import pytest
from error_rates import Cohort, Encoders
from small_datasets import random_records, write_dataset
from test_evaluate_routing import cohort, known, value
from tiny_models import MOE, engine

from moe_ablm.evaluation.cohort import NO_CHAIN, Annotated
from moe_ablm.evaluation.experts import position_only
from moe_ablm.evaluation.experts.assignments import Assignments
from moe_ablm.evaluation.experts.beyond import PositionOnly, References, beyond_numbers
from moe_ablm.evaluation.experts.matching import match, p_value
from moe_ablm.evaluation.experts.position_only import Places, smooth
from moe_ablm.evaluation.experts.shuffled import recipients, shuffle
from moe_ablm.evaluation.experts.specialists import halves, specialists
from moe_ablm.evaluation.experts.traits import contrasts
from moe_ablm.evaluation.nulls import NULLS, POSITION, SHUFFLED, UNTRAINED, untrained
from moe_ablm.evaluation.reporting.claims import ALONE, BEYOND, HOLDS, beyond_verdict
from moe_ablm.evaluation.routing import Settings, evaluate
from moe_ablm.evaluation.subject import Subject
from moe_ablm.inference.route import route
from moe_ablm.model.families import TopK


def bound(n: int) -> float:
    """The most that 5 % may look like in n trials, two standard errors above."""
    return 0.05 + 2 * math.sqrt(0.05 * 0.95 / n)


@pytest.fixture(scope="module")
def antibodies():
    return cohort(80)


@pytest.fixture(scope="module")
def simulated():
    """Simulated antibodies: real lengths of regions."""
    return Cohort.of(80)


def test_smooth_functions_have_the_kernel_that_is_asked_for():
    """Variance 1, correlation exp(-d^2 / 2 l^2), and none between the chains."""
    found = smooth((60, 50), 8, (4000, 1), np.random.default_rng(0))[..., 0]
    assert found.shape == (4000, 110)
    np.testing.assert_allclose(found.var(0), 1, atol=0.12)
    for distance in (4, 8, 16):
        seen = np.mean(found[:, 10] * found[:, 10 + distance])
        assert seen == pytest.approx(math.exp(-(distance**2) / 2 / 64), abs=0.05)
    assert np.mean(found[:, 59] * found[:, 60]) == pytest.approx(0, abs=0.06)


def test_plans_are_those_of_the_family(antibodies):
    places, rng = Places.of(antibodies), np.random.default_rng(0)
    made = {
        name: position_only.plans(MOE[name], places, 5, (3, 2), 2.0, rng)
        for name in ("topk", "expert_choice", "soft")
    }
    count = sum(places.counts)
    assert all(plan.shape == (3, 2, count, 4) for plan in made.values())
    assert (made["topk"].sum(-1) == 2).all() and set(np.unique(made["topk"])) == {0, 1}
    assert (made["expert_choice"].sum(-2) == round(2 * count / 4)).all()
    np.testing.assert_allclose(made["soft"].sum(-1), 1, rtol=1e-5)


def assignments(antibodies, compared, plans, experts: int) -> Assignments:
    sums = Assignments.empty(antibodies, compared, plans[0].shape[1], experts)
    for i, plan in enumerate(plans):
        sums.add(i, plan, plan)
    return sums


def test_sums_by_place_are_those_of_routed_antibodies(antibodies):
    """A router put through the sums of residues, antibody by antibody, as a model's is."""
    compared = contrasts(antibodies)
    places, rng = Places.of(antibodies), np.random.default_rng(1)
    drawn = position_only.plans(TopK(experts=5), places, 6, (1, 3), 2.0, rng)
    ends = np.cumsum([a.antibody.residues for a in antibodies])[:-1]
    plans = [np.moveaxis(drawn[0][:, p], 0, 1) for p in np.split(places.codes, ends)]
    sums = assignments(antibodies, compared, plans, 5)
    owner = np.repeat(sums.group, [a.antibody.residues for a in antibodies])
    tried = [c for c in compared if c.regional]
    assert len(tried) == 2
    for c in tried:
        table = sums.tables[list(compared).index(c)]
        expected = specialists([halves(table[:, :, m], c) for m in range(3)], c)
        found = position_only.specialists_of(position_only.counted(c, places, owner), drawn, c)
        assert set(found) == set(BEYOND) if c.matched == "chain and residue" else found
        for metric, values in found.items():
            np.testing.assert_allclose(
                values[0], [float(e.value) for e in expected[metric]], atol=1e-5
            )


def single(letters: str, unit: str) -> Annotated:
    n = len(letters)
    return Annotated(letters, unit, 0, known(letters, [1] * n, [0] * n, ""), NO_CHAIN)


def test_recipients_by_hand():
    """Of one length and another clone; a length of one clone alone keeps its routing."""
    some = [single("ACD", "u"), single("EFG", "u"), single("HIK", "v"), single("LMN", "w"),
            single("AC", "u"), single("DEFG", "x"), single("HIKL", "x")]  # fmt: skip
    found = recipients(some)
    assert (found[:, 1] == -1).all()
    heavy = found[:, 0]
    assert sorted(heavy[:4]) == [0, 1, 2, 3]
    assert all(some[i].unit != some[j].unit for i, j in enumerate(heavy[:4]))
    assert heavy[4:].tolist() == [4, 5, 6]


def test_shuffling_moves_routing_and_keeps_its_positions(antibodies):
    rng = np.random.default_rng(3)
    plans = [rng.random((a.antibody.residues, 2, 4)).astype(np.float32) for a in antibodies]
    given = shuffle(antibodies, plans)
    targets = recipients(antibodies)
    for i, a in enumerate(antibodies):
        n = len(a.heavy)
        to = targets[i, 0]
        np.testing.assert_array_equal(given[to][: len(antibodies[to].heavy)], plans[i][:n])
        to = targets[i, 1]
        np.testing.assert_array_equal(given[to][len(antibodies[to].heavy) :], plans[i][n:])
    # the sums of the reference are those of antibodies that were routed so
    compared = [c for c in contrasts(antibodies) if c.regional]
    sums = assignments(antibodies, compared, given, 4)
    references = References(antibodies, compared, sums.group, (2, 4))
    for i, plan in enumerate(plans):
        references.add_shuffled(i, plan)
        references.add_untrained(i, given[i])
    for number, c in enumerate(compared):
        table = sums.tables[number]
        expected = specialists([halves(table[:, :, m], c) for m in range(2)], c)["excess"]
        for null in (SHUFFLED, UNTRAINED):
            found = references.specialists(number)[null]["excess"]
            # float32 sums in another order
            np.testing.assert_allclose(
                [e.value for e in found], [e.value for e in expected], atol=1e-6
            )


def test_an_untrained_encoder_is_new_and_always_the_same():
    mine = engine("topk")
    one, again = untrained(mine).model, untrained(mine).model
    assert one.digest() == again.digest() != mine.model.digest()
    assert one.spec == mine.model.spec and "untrained" in one.source
    # of other weights it is another one
    assert untrained(untrained(mine)).model.digest() not in (one.digest(), mine.model.digest())


def test_an_engine_with_another_model_is_that_of_the_model():
    mine = engine("topk")
    fresh = untrained(mine)
    some = cohort(6)
    found = route(fresh, [a.antibody for a in some])
    expected = route(type(mine)(fresh.model), [a.antibody for a in some])
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.experts, b.experts)
    with pytest.raises(ValueError, match="another encoder"):
        mine.with_model(engine().model)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    records = random_records(60, seed=4, shortest=11, longest=14)
    return write_dataset(tmp_path_factory.mktemp("nulls") / "data", records, split=2)


def test_every_report_has_the_nulls(dataset, tmp_path):
    outcome = evaluate(Subject(engine("topk"), dataset, tmp_path), Settings())
    for null in NULLS:
        for metric in BEYOND:
            about = {"region": "CDRH3", "matched": "chain and residue", "null": null}
            under = value(outcome.numbers, f"null_{metric}", **about)
            above = value(outcome.numbers, f"beyond_null_{metric}", **about)
            own = value(outcome.numbers, f"cdrh3_{metric}", matched="chain and residue")
            assert under.value + above.value == pytest.approx(own.value)
            assert above.low <= above.value <= above.high
    assert any("keep their routing" in note for note in outcome.notes)


@pytest.mark.parametrize("null", [POSITION, SHUFFLED])
def test_a_router_by_position_has_nothing_beyond_shuffled_antibodies(dataset, tmp_path, null):
    """Smooth functions of the position; shuffled plans shuffled again are near it, not the same."""
    subject = Subject(engine("topk"), dataset, tmp_path, null=null)
    numbers = evaluate(subject, Settings()).numbers
    found = [n for n in numbers if n.metric == "beyond_null_excess"]
    found = [n for n in found if n.labels["null"] == SHUFFLED]
    assert len(found) > 20
    if null == POSITION:
        np.testing.assert_allclose([n.value for n in found], 0, atol=1e-9)
    assert [n for n in numbers if n.metric == "gate_share"]


def test_a_planted_expert_of_cdrh3_is_beyond_all_routers_by_position():
    """One that takes CDRH3 and nothing else, the others at random: all intervals above 0."""
    some = cohort(120, seed=5)
    compared = contrasts(some)

    def rule(antibody):
        rng = np.random.default_rng(antibody.key)
        region = antibody.region_index()
        choice = np.where(region == 5, 7, rng.integers(0, 7, len(region)))
        return np.eye(8, dtype=np.float32)[choice][:, None]

    plans = [rule(a) for a in some]
    sums = assignments(some, compared, plans, 8)
    region = next(c for c in compared if c.regional and c.matched == "chain and residue")
    table = sums.tables[list(compared).index(region)]
    own = specialists([halves(table[:, :, 0], region)], region)
    references = References(some, [region], sums.group, (1, 8))
    rng = np.random.default_rng(0)
    for i, plan in enumerate(plans):
        references.add_shuffled(i, plan)
        references.add_untrained(i, rng.permutation(plan))
    routers = PositionOnly(some, [region], sums.group, (TopK(experts=8), 1, 1.0), rng, (4, 10))
    numbers = beyond_numbers(region, own, references.specialists(0), routers.specialists[0])
    for null in (SHUFFLED, UNTRAINED):
        assert value(numbers, "beyond_null_excess", region="CDRH3", null=null).low > 0
        assert value(numbers, "beyond_null_over_others", region="CDRH3", null=null).low > 0
    assert value(numbers, "beyond_null_over_others", region="CDRH3", null=POSITION).low > 0


def test_routers_by_position_rarely_hold_even_beyond_random_ones_alone(simulated):
    null = simulated.of_cdrh3(simulated.routers(1))
    scales = (7, 25, 40)
    judged = simulated.of_cdrh3(simulated.routers(2, scales))
    for seeds in error_rates.SEEDS:
        rng = np.random.default_rng(seeds)
        for i, scale in enumerate(scales):
            each = {m: v[i] for m, v in judged.items()}
            rate = error_rates.false_positional(each, null, seeds, 300, rng)
            assert rate <= bound(300), (seeds, scale, rate)


def test_one_seed_cannot_tell():
    values = {(metric, null): [5.0] for metric in BEYOND for null in NULLS}
    assert beyond_verdict(values, dict.fromkeys(BEYOND, [0.1])) == ALONE
    two = {k: [5.0, 5.1] for k in values}
    assert beyond_verdict(two, dict.fromkeys(BEYOND, [0.1, 0.1])) == HOLDS


@pytest.mark.parametrize("name", sorted(error_rates.SEED_SDS))
def test_equal_models_rarely_hold(name):
    for seeds in error_rates.SEEDS:
        rng = np.random.default_rng(seeds)
        held, covered = error_rates.false_equal(error_rates.SEED_SDS[name], seeds, 80, rng)
        assert held <= bound(80), (seeds, held)
        assert covered >= 0.9, (seeds, covered)


def test_unrelated_routers_by_position_are_alike_one_time_in_twenty(simulated):
    nulls = error_rates.pair_correlations(simulated.routers(1))
    assert len(nulls) == len(position_only.SCALES)
    judged = simulated.routers(2, (4, 10, 25))
    for scale, profiles in judged.profiles.items():
        rate = error_rates.false_matches(profiles, nulls)
        assert rate <= bound(len(profiles) // 2), (scale, rate)
    # and seeds that do agree are found
    one = judged.profiles[10][0]
    noisy = one + 0.2 * np.random.default_rng(0).standard_normal(one.shape)
    assert p_value(float(match(one, noisy).correlation.mean()), nulls) < 0.02


@pytest.mark.slow
def test_untrained_encoders_rarely_hold(simulated):
    encoders = Encoders.of(simulated, 60)
    for seeds in error_rates.SEEDS:
        for nulls in ((UNTRAINED,), (SHUFFLED, UNTRAINED)):
            rng = np.random.default_rng(seeds)
            rate = error_rates.false_untrained(encoders, nulls, seeds, 1000, rng)
            assert rate <= 0.05, (seeds, nulls, rate)
    nulls = error_rates.pair_correlations(simulated.routers(1))
    assert error_rates.false_matches(encoders.profiles, nulls) <= bound(30)
