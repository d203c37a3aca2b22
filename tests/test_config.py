"""Checks of the config, and what identifies a run."""

import dataclasses
import json

import pytest
from conftest import tiny_config

from configs import base, ladder, quickstart
from moe_ablm import config as configs
from moe_ablm.errors import UserError
from moe_ablm.model.spec import SIZES


def changed(**changes):
    c = base.get_config()
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return c


@pytest.mark.parametrize(
    "tree",
    [base.get_config(), quickstart.get_config()]
    + [ladder.get_config(f"size={size},data=half,router=top2,experts=4") for size in SIZES],
    ids=lambda t: t.model.size,
)
def test_shipped_configs_are_valid(tree):
    configs.from_mapping(tree)


def test_ladder_arguments():
    c = ladder.get_config("size=35m,data=half,router=top2,experts=16")
    assert (c.model.size, c.data.fraction) == ("35m", "half")
    assert (c.model.moe.router, c.model.moe.k, c.model.moe.experts) == ("topk", 2, 16)
    assert ladder.get_config().model.moe.router == "none"


def test_every_key_of_a_section_is_known_and_required():
    tree = base.get_config().to_dict()
    tree["train"]["stepz"] = 1
    with pytest.raises(UserError, match=r"train\.stepz is not a config key .*'steps'"):
        configs.from_mapping(tree)
    del tree["train"]["stepz"], tree["train"]["lr"]
    with pytest.raises(UserError, match=r"train\.lr is missing"):
        configs.from_mapping(tree)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__fraction": "quater"}, "'quater' .did you mean 'quarter'"),
        ({"data__mask_rate": 1.5}, "mask_rate=1.5: expected between 0 and 1"),
        ({"train__steps": 0}, "train.steps=0: expected a positive number"),
        ({"train__warmup": 99_999}, r"warmup=99999: expected 0 to train.steps \(10000\)"),
        ({"train__lr": float("nan")}, "train.lr=nan"),
        ({"train__lr": float("inf")}, "train.lr=inf"),
        ({"mesh__data": 0}, "mesh.data=0"),
        ({"model__size": "8mm"}, "'8mm' .did you mean '8m'"),
        ({"model__heads": 7}, "heads=7 does not divide model.d_model=320"),
        ({"model__heads": 320}, "even head width"),
        ({"model__moe__router": "topk", "model__moe__k": 9}, r"k=9: expected 1 to .*experts \(8\)"),
        ({"model__moe__router": "topk", "model__moe__placement": "last_7"}, "last_7"),
        ({"model__moe__router": "topk", "model__moe__placement": "1,6"}, "1,6"),
    ],
)
def test_wrong_values_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        configs.from_mapping(changed(**changes))


def test_a_number_may_be_an_integer_where_a_float_is_expected():
    tree = base.get_config().to_dict()
    tree["train"]["clip"] = 1
    assert configs.from_mapping(tree).train.clip == 1.0
    tree["train"]["steps"] = 1.5
    with pytest.raises(UserError, match="train.steps=1.5: expected int"):
        configs.from_mapping(tree)


@pytest.mark.parametrize(
    ("placement", "first_dense", "layers"),
    [
        ("every", 0, (0, 1, 2, 3, 4, 5)),
        ("every", 2, (2, 3, 4, 5)),
        ("alternate", 1, (1, 3, 5)),
        ("last_2", 1, (4, 5)),
        ("4,0,4", 0, (0, 4)),
        ("4,0", 1, (4,)),
    ],
)
def test_placement(placement, first_dense, layers):
    c = changed(model__moe__router="topk", model__moe__placement=placement)
    c.model.moe.first_dense = first_dense
    assert configs.from_mapping(c).model.spec().moe_layers == layers


def test_fingerprint_ignores_hardware_and_follows_everything_else():
    first = tiny_config()
    same = tiny_config(
        mesh__data=1, compute__precision="float32", checkpoint__every=7, log__every=3
    )
    assert configs.fingerprint(first, "d") == configs.fingerprint(same, "d")
    assert configs.fingerprint(first, "d") != configs.fingerprint(first, "other data")
    for section in dataclasses.fields(configs.Config):
        if section.name in ("mesh", "compute", "checkpoint", "log"):
            continue
        part = getattr(first, section.name)
        if not dataclasses.is_dataclass(part):
            other = dataclasses.replace(first, **{section.name: part + 1})
            assert configs.fingerprint(other, "d") != configs.fingerprint(first, "d")
    assert configs.fingerprint(tiny_config(train__lr=1e-4), "d") != configs.fingerprint(first, "d")


def test_a_config_survives_json():
    first = tiny_config()
    again = configs.from_mapping(json.loads(json.dumps(configs.to_dict(first))))
    assert again == first
