"""Limited experts: how many places there are, and who finds one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ablm.model.families import ExpertChoice, TopK
from moe_ablm.model.routers import place_in_queue, places, tokens_of_antibody

places_found = jax.jit(place_in_queue)


@pytest.mark.parametrize(
    ("limit", "k", "experts", "tokens", "expected"),
    [
        (1.0, 2, 8, 256, 64),
        (1.25, 2, 8, 256, 80),
        (1.0, 1, 8, 9, 2),  # a share of 1.125 needs a second place
        (0.5, 1, 4, 8, 1),
        (0.25, 1, 8, 3, 1),  # never 0 while there is a token
        (0.1, 1, 1, 30, 3),  # 0.1 * 30 is 3.0000000000000004
        (1.1, 1, 10, 100, 11),  # 1.1 * 100 / 10 is 11.000000000000002
        (4.0, 2, 8, 6, 6),
        (1.0, 2, 8, 0, 0),
    ],
)
def test_capacity_by_hand(limit, k, experts, tokens, expected):
    spec = TopK(experts=experts, k=k, capacity=limit)
    assert spec.places(tokens) == expected


def test_capacity_of_expert_choice_is_a_fair_share():
    """k * tokens / E by default (Zhou et al. 2022)."""
    assert ExpertChoice(experts=8, k=2).places(64) == 16
    assert ExpertChoice(experts=8, k=2, capacity=0.5).places(64) == 8


def test_places_are_the_capacities_of_many():
    spec = TopK(experts=3, k=2, capacity=0.7)
    counts = np.array([[0, 5], [9, 2]])
    found = places(jnp.asarray(counts), 9, spec)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, np.vectorize(spec.places)(counts))


def test_places_in_queues_by_hand():
    """By score within a queue; ties by who comes first; rows apart."""
    queue = jnp.asarray([[0, 1, 0, 0, 1, 2], [2, 2, 2, 2, 2, 2]])
    score = jnp.asarray([[0.1, 0.5, 0.9, 0.1, 0.6, 0.0], [0.5, 0.5, 0.7, 0.5, 0.7, 0.1]])
    found = places_found(queue, score)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, [[1, 1, 0, 2, 0, 0], [2, 3, 0, 4, 1, 5]])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 4))
def test_places_of_any_queues(seed, queues, levels):
    """Few levels of score: many ties."""
    rng = np.random.default_rng(seed)
    queue = rng.integers(0, queues, (2, 17))
    score = rng.integers(0, levels, (2, 17)) / levels
    found = places_found(jnp.asarray(queue), jnp.asarray(score, jnp.float32))
    for row in range(2):
        for q in range(queues):
            here = np.flatnonzero(queue[row] == q)
            order = sorted(here, key=lambda i: (-score[row, i], i))  # noqa: B023
            np.testing.assert_array_equal(np.asarray(found)[row, order], np.arange(len(here)))


def test_tokens_of_antibody():
    antibody = jnp.asarray([[1, 1, 2, 2, 2, 0], [1, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(
        tokens_of_antibody(antibody), [[2, 2, 3, 3, 3, 1], [1, 5, 5, 5, 5, 5]]
    )
