"""What a run is fed: validation sets of each regime, several datasets, needed annotation."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from small_datasets import Record, random_records, write_dataset

from configs.base import get_config
from moe_ablm import config as configs
from moe_ablm.errors import UserError
from moe_ablm.feed import Feed
from moe_ablm.model.encoder import Encoder
from moe_ablm.model.spec import EncoderSpec, Execution
from moe_ablm.training.step import make_eval_step


def config(batch=4, **data):
    c = get_config()
    c.train.batch, c.train.steps, c.eval.pairs = batch, 30, 12
    c.train.warmup = 0
    c.data.length = 64
    for key, value in data.items():
        c.data[key] = value
    return configs.from_mapping(c)


def dataset(path, n, seed, make=lambda r: r):
    records = [make(r) for r in random_records(n, seed)]
    return write_dataset(path, records, np.arange(n) % 3 // 2)  # a third for validation


@pytest.fixture(scope="module")
def antibodies(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("data") / "antibodies", 60, seed=1)


@pytest.fixture(scope="module")
def chains_alone(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "chains"
    return dataset(path, 90, seed=2, make=lambda r: Record(r.heavy, ""))


def rows_and_chains(feed: Feed) -> tuple[int, int]:
    """Sequences of the validation set, and chains in them."""
    batches = list(feed.valid_batches())
    sequences = sum(int((b["segment"][:, 0] > 0).sum()) for b in batches)
    chains = sum(int((b["segment"] == code).any(1).sum()) for b in batches for code in (1, 2))
    return sequences, chains


@pytest.mark.parametrize(
    "regime, chains", [("paired", 24), ("shuffled", 24), ("mixed:0.5", 24), ("unpaired", 12)]
)
def test_validation_shows_native_pairs_or_chains_alone(antibodies, regime, chains):
    feed = Feed(config(regime=regime), antibodies)
    assert rows_and_chains(feed) == (12, chains)


def test_validation_is_the_same_for_all_regimes_that_show_pairs(antibodies):
    feeds = [
        Feed(config(regime="paired"), antibodies),
        Feed(config(regime="shuffled", mask="cdr3:0.25"), antibodies),
        Feed(config(regime="curriculum:sigmoid", mask="span"), antibodies),
    ]
    first, *others = ([b["tokens"] for b in feed.valid_batches()] for feed in feeds)
    for other in others:
        np.testing.assert_array_equal(other, first)


def test_validation_rows_beside_packed_ones_are_short(antibodies):
    padded = Feed(config(), antibodies)
    packed = Feed(config(batch=2, batching="packed", length=320), antibodies)
    batches = list(packed.valid_batches())
    assert {b["tokens"].shape for b in batches} == {(10, 64)}  # 2 rows of 320 tokens in rows of 64
    joined = {
        name: np.concatenate([b[name] for b in feed.valid_batches()])[:12]
        for name, feed in (("tokens", padded), ("loss_mask", padded))
    }
    for name, array in joined.items():
        np.testing.assert_array_equal(np.concatenate([b[name] for b in batches])[:12], array)


def test_unpaired_doubled_has_twice_the_rows(antibodies):
    feed = Feed(config(regime="unpaired:doubled"), antibodies)
    assert next(feed.train_batches(0))["tokens"].shape == (8, 64)


def test_only_shared_rows_say_where_their_antibodies_are(antibodies):
    for batching, there in (("padded", False), ("bucketed", False), ("packed", True)):
        feed = Feed(config(batching=batching, buckets=(32, 64)), antibodies)
        assert ({"antibody", "position"} <= next(feed.train_batches(0)).keys()) == there
        assert "position" not in next(feed.valid_batches())


def test_packed_and_padded_epochs_have_the_same_loss(antibodies):
    """All training antibodies of epoch 0, same masks: the sums by region agree."""
    spec = EncoderSpec(layers=2, d_model=32, ffn=64, heads=2)
    graph, params = nnx.split(Encoder(spec, Execution(), nnx.Rngs(0)))
    step = jax.jit(make_eval_step(graph))

    def losses(**data):
        rows = Feed(config(**data), antibodies).mixture.streams[0].rows
        batch = next(Feed(config(batch=rows, **data), antibodies).train_batches(0))
        return batch["tokens"].shape, step(params, batch).sums

    (rows, _), padded = losses()
    (fewer, _), packed = losses(batching="packed", length=200)
    assert rows == 40
    assert fewer < 10
    np.testing.assert_array_equal(packed.tokens, padded.tokens)
    assert padded.tokens.sum() > 100
    np.testing.assert_allclose(packed.loss, padded.loss, rtol=1e-5, atol=1e-5)


def test_several_datasets(antibodies, chains_alone):
    both = Feed(config(path=("a", "b"), weights=(1.0, 1.0)), antibodies, chains_alone)
    assert len(both.train_rows) == 40 + 60
    assert both.identity not in (antibodies.identity, chains_alone.identity)
    assert Feed(config(), antibodies).identity == antibodies.identity
    swapped = Feed(config(path=("b", "a"), weights=(1.0, 1.0)), chains_alone, antibodies)
    assert swapped.identity != both.identity
    assert rows_and_chains(both) == (12, 6 * 2 + 6)


def test_policies_need_their_annotation(chains_alone, antibodies):
    for mask, what in (("cdr3:0.25", "CDR3"), ("nongermline:0.25", "mutated residue")):
        with pytest.raises(UserError, match=f"has no annotated {what}") as error:
            Feed(config(mask=mask), chains_alone)
        assert str(chains_alone.path) in str(error.value)
        Feed(config(mask=mask), antibodies)


def test_no_validation_antibody(tmp_path):
    d = write_dataset(tmp_path / "d", random_records(5, seed=3))
    with pytest.raises(UserError, match="no antibody of the valid split"):
        Feed(config(), d)


@pytest.mark.parametrize(
    "data, message",
    [
        ({"regime": "shufled"}, "did you mean 'shuffled'"),
        ({"regime": "mixed:2"}, "SHARE=2"),
        ({"mask": "cdr3"}, "did you mean 'cdr3:RATE'"),
        ({"batching": "pack"}, "did you mean 'packed'"),
        ({"batching": "bucketed"}, r"rising lengths, the last one data.length \(64\)"),
        ({"batching": "bucketed", "buckets": (32, 32, 64)}, "rising lengths"),
        ({"batching": "bucketed", "buckets": (0, 64)}, "rising lengths"),
        ({"batching": "bucketed", "buckets": ()}, "rising lengths"),
        ({"weights": (1.0, 2.0)}, r"one number for each dataset of data.path \(1\)"),
        ({"path": ("a", "b"), "weights": (0.0, 0.0)}, "at least one above 0"),
        ({"path": ("a", "b"), "weights": (1.0, -1.0)}, "0 or more"),
        ({"path": ("a", "b"), "weights": (1.0, "x")}, r"weights\[1\]='x': expected float"),
        ({"path": ("a", "a")}, "several different ones"),
        ({"path": ()}, "one dataset or several"),
        ({"path": 3}, "expected str or several"),
        ({"length": 65536}, "less than 65,536"),
    ],
)
def test_wrong_values_of_the_data_section(data, message):
    with pytest.raises(UserError, match=message) as error:
        config(**data)
    assert "\n" not in str(error.value)


def test_tuples_survive_the_config_file():
    """config.json has lists; resuming compares what they become."""
    c = config(path=("a", "b"), weights=(1.0, 2.0), batching="bucketed", buckets=(32, 64))
    again = configs.from_mapping(json.loads(json.dumps(configs.to_dict(c))))
    assert again == c
    assert configs.fingerprint(again, "x") == configs.fingerprint(c, "x")
