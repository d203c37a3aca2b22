"""One antibody at a time is what is meant, many at once is how it is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from moe_blocks import jit
from tiny_models import MOE, engine, tiny_model

from moe_ablm.data.antibody import row_of
from moe_ablm.data.tokenizer import LAYOUTS
from moe_ablm.errors import UserError
from moe_ablm.inference import buckets
from moe_ablm.inference.antibodies import given
from moe_ablm.inference.buckets import Engine
from moe_ablm.inference.embed import HiddenStates
from moe_ablm.inference.logits import EveryPosition
from moe_ablm.model.encoder import Encoder
from moe_ablm.model.spec import Execution

PAIRS = [("EVQLVES", "DIQM"), ("EV_", ""), ("EVQLXTY", "DIQMTQ"), ("QVQ", "EI"), ("MKTAYIW", "")]
ROWS = [
    row_of(a, LAYOUTS["esm"]).tokens for a in given(PAIRS, LAYOUTS["esm"], 64, "EVQX_LSDIMTYKAW")
]


def computed(engine: Engine, rows: list[np.ndarray], task=None) -> list[np.ndarray]:
    """Results of each row without padding."""
    found = dict(engine.run(task or HiddenStates(2), rows))
    assert sorted(found) == list(range(len(rows)))
    return [found[i][: len(row)] for i, row in enumerate(rows)]


def close(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """To 1e-6 of the length of the vectors."""
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() <= 1e-6 * np.linalg.norm(b, axis=-1).max()


# seconds each: those that a sibling stands for by --slow
SLOW = ("topp", "expert_choice", "sequence")


@pytest.mark.parametrize(
    "router", [pytest.param(r, marks=pytest.mark.slow) if r in SLOW else r for r in MOE]
)
def test_neighbours_order_batch_and_padding_change_nothing(router, monkeypatch):
    """All at once, in another order, each alone, and padded to four times the length."""
    together = computed(engine(router), ROWS)
    order = [3, 0, 4, 2, 1]
    shuffled = computed(engine(router), [ROWS[i] for i in order])
    close([shuffled[order.index(i)] for i in range(5)], together)
    one_by_one = engine(router, batch_tokens=1)
    close(computed(one_by_one, ROWS), together)
    monkeypatch.setattr(buckets, "MULTIPLE", 64)
    close(computed(engine(router, batch_tokens=640), ROWS), together)


@pytest.mark.parametrize("router", ["dense", "topk", "expert_choice batch", "pads routed", "soft"])
def test_an_antibody_is_computed_as_the_encoder_does_alone_and_unpadded(router):
    model = tiny_model(router)
    definition = nnx.split(nnx.eval_shape(lambda: Encoder(model.spec, Execution(), nnx.Rngs(0))))[0]
    encode = jit(lambda params, *row: nnx.merge(definition, params)(*row).logits[0])
    row = ROWS[0]
    expected = encode(
        model.params, jnp.asarray(row[None].astype(int)), jnp.ones((1, len(row)), bool)
    )
    (found,) = computed(engine(router), [row], EveryPosition())
    np.testing.assert_allclose(found, jax.nn.log_softmax(expected), atol=2e-5)


def test_batches_hold_every_row_once_in_two_shapes_a_bucket():
    some = Engine(tiny_model(), batch_tokens=16 * 32)
    lengths = [5] * 40 + [16] * 3 + [17] * 20 + [300] * 2
    batches = list(some._batches(lengths))
    members = np.concatenate([m for m, *_ in batches])
    assert sorted(members) == list(range(len(lengths)))
    for which, length, rows in batches:
        assert all(length - 16 < lengths[i] <= length for i in which) and len(which) <= rows
    shapes = {(length, rows) for _, length, rows in batches}
    # 43 of 32 rows: a full one and 11 more; 20 of 16: one and 4 alone; longer than a batch: alone
    assert shapes == {(16, 32), (32, 16), (32, 1), (304, 1)}


@pytest.mark.parametrize("tokens", [200_000, 10**30])
def test_room_for_more_tokens_does_not_compute_rows_one_by_one(tokens):
    """However much more room there is than the rows of a bucket need."""
    lengths = [16] * 5_000
    usual, roomy = (engine("topk", batch_tokens=n)._batches(lengths) for n in (None, tokens))
    batches = list(roomy)
    assert sorted(np.concatenate([m for m, *_ in batches]).tolist()) == list(range(5_000))
    assert len(batches) <= len(list(usual)) < 50


def test_a_shape_is_compiled_once(capsys, monkeypatch):
    monkeypatch.setattr(buckets, "REPORTED_FROM", 0.0)
    some = Engine(tiny_model(layers=1), batch_tokens=64)
    for _ in range(2):
        computed(some, ROWS[:1], HiddenStates(0))
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "compiled for 1 row of 16 tokens" in told[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"devices": 99}, "--devices 99: expected 1 to"),
        ({"devices": 0}, "--devices 0"),
        ({"precision": "float16"}, "float16: expected one of float32"),
        ({"batch_tokens": 0}, "--batch-tokens 0"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        Engine(tiny_model(), **options)


def test_bfloat16_operands_come_close():
    quick = Engine(tiny_model(), precision="bfloat16_operands")
    for a, b in zip(computed(quick, ROWS[:1]), computed(engine(), ROWS[:1]), strict=True):
        assert 0 < np.abs(a - b).max() < 0.1
