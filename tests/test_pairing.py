import numpy as np
import pytest

from moe_ablm.data.simulate import gene_frequencies, mutual_information, tilted_pairing

HEAVY = np.array([0.5, 0.3, 0.15, 0.05])
LIGHT = np.array([0.6, 0.1, 0.3])


@pytest.mark.parametrize("tilt", [0.0, 0.5, -2.0, 6.0])
def test_marginals_hold(tilt):
    joint = tilted_pairing(HEAVY, LIGHT, tilt)
    np.testing.assert_allclose(joint.sum(1), HEAVY, rtol=1e-9)
    np.testing.assert_allclose(joint.sum(0), LIGHT, rtol=1e-9)


def test_no_tilt_is_independence():
    joint = tilted_pairing(HEAVY, LIGHT, 0.0)
    np.testing.assert_allclose(joint, np.outer(HEAVY, LIGHT), rtol=1e-12)
    assert mutual_information(joint) == pytest.approx(0, abs=1e-12)


def test_odds_ratio_between_classes():
    # by falling frequency: heavy genes 0, 2 and 1, 3; light genes 0, 1 and 2
    joint = tilted_pairing(HEAVY, LIGHT, 0.7)
    ratio = joint[2, 1] * joint[3, 2] / (joint[2, 2] * joint[3, 1])
    assert np.log(ratio) == pytest.approx(1.4)


@pytest.mark.parametrize("tilt", [0.5, 2.0])
def test_two_even_genes_have_the_closed_form(tilt):
    joint = tilted_pairing(np.array([0.5, 0.5]), np.array([0.5, 0.5]), tilt)
    p = 1 / (1 + np.exp(-tilt))  # probability that the classes agree
    bits = 1 + p * np.log2(p) + (1 - p) * np.log2(1 - p)
    assert mutual_information(joint) == pytest.approx(bits)


def test_information_of_tables_made_by_hand():
    assert mutual_information(np.eye(4) / 4) == pytest.approx(2)
    assert mutual_information(np.array([[0.25, 0.25], [0.0, 0.5]])) == pytest.approx(
        0.3112781, 1e-6
    )


def test_gene_frequencies_are_in_the_order_of_names():
    assert gene_frequencies({"b": 1, "a": 3}).tolist() == [0.75, 0.25]
