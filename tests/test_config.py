"""Checks of the config, and what identifies a run."""

import dataclasses
import json

import pytest
from conftest import tiny_config

from configs import base, ladder, quickstart
from moe_ablm import config as configs
from moe_ablm.config_schema import DROPOUTS, Config, MoEConfig
from moe_ablm.errors import UserError
from moe_ablm.model.families import FAMILIES
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
        (
            {"train__warmup": 99_999},
            r"99999: expected 0 to train.steps \(10000\): lower it",
        ),
        (
            {"train__schedule": "wsd", "train__warmup": 8001},
            r"warmup=8001 .* 2000 steps .*share=0.2.*[.]steps=10000: .*lower train.warmup to 8000",
        ),
        (
            {"train__schedule": "wsd", "train__steps": 5, "train__warmup": 5},
            r"warmup=5 .* 1 steps .*[.]steps=5: .*lower train.warmup to 4",
        ),
        ({"log__profile": "5"}, "log.profile='5': expected FROM:TO, .* such as 20:24, .*10000"),
        ({"log__profile": "0:3"}, "log.profile='0:3': expected FROM:TO"),
        ({"log__profile": "7:6"}, "log.profile='7:6': expected FROM:TO"),
        ({"log__profile": "9999:10001"}, "log.profile='9999:10001': expected FROM:TO"),
        ({"log__profile": "1:x"}, "log.profile='1:x': expected FROM:TO"),
        ({"train__lr": float("nan")}, "train.lr=nan"),
        ({"train__lr": float("inf")}, "train.lr=inf"),
        ({"train__beta1": 2.0}, "train.beta1=2.0: expected 0 to below 1"),
        ({"train__beta2": 1.0}, "train.beta2=1.0: expected 0 to below 1"),
        ({"train__eps": -1.0}, "train.eps=-1.0: expected a positive number"),
        ({"train__eps": 0.0}, "train.eps=0.0: expected a positive number"),
        ({"train__weight_decay": -1.0}, "train.weight_decay=-1.0: expected 0 .off. or more"),
        ({"compute__loader_threads": 10**6}, "loader_threads=1000000: expected at most 1,024"),
        ({"model__layers": 100_000}, "model.layers=100000: expected 1 to 4,096"),
        ({"mesh__data": 0}, "mesh.data=0"),
        ({"model__size": "8mm"}, "'8mm' .did you mean '8m'"),
        ({"model__heads": 7}, "heads=7 does not divide model.d_model=320"),
        ({"model__heads": 320}, "even head width"),
        ({"model__hidden_dropout": 1.0}, r"hidden_dropout=1.0: expected 0 \(off\) to below 1"),
        ({"model__attention_dropout": -0.1}, "attention_dropout=-0.1: expected 0"),
        ({"compute__remat": "matmul"}, "'matmul' .did you mean 'matmuls'"),
        ({"model__moe__router": "topk", "model__moe__k": 9}, r"k=9: expected 1 to .*experts \(8\)"),
        ({"model__moe__router": "topk", "model__moe__placement": "last_7"}, "last_7"),
        ({"model__moe__router": "topk", "model__moe__placement": "1,6"}, "1,6"),
    ],
)
def test_wrong_values_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        configs.from_mapping(changed(**changes))


def test_warm_up_and_decay_may_fill_a_run():
    t = configs.from_mapping(changed(train__schedule="wsd", train__warmup=8000)).train
    assert t.warmup + t.decay_steps() == t.steps
    assert configs.from_mapping(changed(train__warmup=10_000)).train.schedule == "linear"


# one wrong value of model.moe each, beside others that are right: the key's name is in the message
WRONG = [
    (
        "topk",
        {"router": "top_k"},
        "router='top_k' .did you mean 'topk'.*: expected one of none, topk",
    ),
    ("topk", {"group": "batches"}, "group='batches' .did you mean 'batch'"),
    ("topk", {"gate": "softmix"}, "gate='softmix' .did you mean 'softmax'"),
    ("topk", {"experts": 0}, "experts=0: expected 1 to 65,536"),
    ("topk", {"k": 0}, r"k=0: expected 1 to model.moe.experts \(8\)"),
    ("topk", {"k": 9}, r"k=9: expected 1 to model.moe.experts \(8\)"),
    ("soft", {"slots": 0}, "slots=0: expected a positive number"),
    ("topk", {"shared": -1}, "shared=-1: expected 0 or more"),
    ("topk", {"first_dense": -1}, "first_dense=-1: expected 0 or more"),
    ("topk", {"first_dense": 6}, "first_dense=6 leaves none of the 6 layers to experts"),
    ("topk", {"balance_rate": -0.1}, "balance_rate=-0.1: expected 0 or more"),
    ("topk", {"load_balance": -1.0}, "load_balance=-1.0: expected 0 or more"),
    ("topk", {"z_loss": -1.0}, "z_loss=-1.0: expected 0 or more"),
    ("topp", {"entropy_loss": -1.0}, "entropy_loss=-1.0: expected 0 or more"),
    ("topp", {"threshold": 0.0}, "threshold=0.0: expected above 0, at most 1"),
    ("topp", {"threshold": 1.1}, "threshold=1.1: expected above 0, at most 1"),
    ("topk", {"exceed": False}, "exceed=False: expected True with model.moe.router='topk'"),
    ("topp", {"gate": "tokens"}, "gate='tokens': expected one of softmax, sigmoid"),
    ("topk", {"jitter": 1.0}, r"jitter=1.0: expected 0 \(off\) to below 1"),
    ("topk", {"ffn": 0}, "ffn=0: expected a positive number or None"),
    ("topk", {"capacity": 0.0}, "capacity=0.0: expected more than 0, .* no slot"),
    ("topk", {"capacity": -1.0}, "capacity=-1.0: expected more than 0"),
    ("topk", {"widths": (8, 8)}, r"widths=\(8, 8\): .* each of model.moe.experts \(8\)"),
    ("topk", {"widths": (8,) * 7 + (0,)}, "widths=.*: expected a positive width"),
    ("topk", {"widths": ()}, r"widths=\(\): expected a positive width"),
    ("topk", {"pads": "logit"}, "pads='logit'.*: expected excluded, none, or some of logits, "),
    ("topk", {"pads": "excluded,aux"}, "pads='excluded,aux'.*: expected excluded, none"),
    ("topk", {"placement": "odd"}, "placement='odd', 6 layers: expected every, alternate, last_N"),
    ("topk", {"placement": ""}, "placement='', 6 layers"),
    ("topk", {"placement": "last_0"}, "placement='last_0'"),
    ("topk", {"placement": "-1"}, "placement='-1'"),
    # what one router can do and another cannot
    ("expert_choice", {"widths": (8,) * 8}, "widths=.*: expected None .*'expert_choice'.* equal"),
    ("soft", {"widths": (8,) * 8}, "widths=.*: expected None .*'soft'"),
    ("expert_choice", {"balance_rate": 0.1}, "balance_rate=0.1: expected 0.0 .*balanced by con"),
    ("soft", {"balance_rate": 0.1}, "balance_rate=0.1: expected 0.0 .*'soft'"),
    ("soft", {"capacity": 1.0}, "capacity=1.0: expected None .*'soft', which has no queues"),
    ("sequence", {"capacity": 1.0}, "capacity=1.0: expected None .*'sequence'"),
    ("soft", {"group": "batch"}, "group='batch': expected 'sequence' .*'soft'"),
    ("sequence", {"group": "batch"}, "group='batch': expected 'sequence' .*'sequence'"),
    ("soft", {"pads": "none"}, "pads='none': expected 'excluded' .*'soft'"),
    ("sequence", {"pads": "aux"}, "pads='aux': expected 'excluded' .*'sequence'"),
    ("sequence", {"jitter": 0.1}, "jitter=0.1: expected 0.0 .*'sequence': tokens"),
    ("topk", {"l2": True}, "l2=True: expected False with model.moe.router='topk'"),
    ("topk", {"l2_scale": 2.0}, "l2_scale=2.0: expected None with model.moe.router='topk'"),
    ("soft", {"l2_scale": 2.0}, "l2_scale=2.0: expected a positive number with model.moe.l2"),
    ("soft", {"l2": True, "l2_scale": 0.0}, "l2_scale=0.0: expected a positive number"),
]


def moe_config(router: str, /, **changes):
    return changed(**{f"model__moe__{k}": v for k, v in ({"router": router} | changes).items()})


@pytest.mark.parametrize(("router", "changes", "message"), WRONG, ids=str)
def test_wrong_experts_end_in_one_clear_line(router, changes, message):
    with pytest.raises(UserError, match=rf"^config\.model\.moe[.:].*{message}") as raised:
        configs.from_mapping(moe_config(router, **changes))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 200


RIGHT = [
    ("topk", {"k": 8, "capacity": 0.01, "gate": "sigmoid", "renormalise": False}),
    ("topk", {"widths": (8,) * 4 + (16,) * 4, "balance_rate": 0.001, "shared": 1}),
    ("topk", {"pads": "probabilities, aux", "group": "batch", "jitter": 0.01}),
    ("topp", {"threshold": 1.0, "entropy_loss": 1e-4, "pads": "none", "widths": (8,) * 8}),
    ("expert_choice", {"capacity": 0.5, "pads": "logits,probabilities,aux", "group": "batch"}),
    ("soft", {"slots": 1, "l2": True, "l2_scale": 2.0, "jitter": 0.01, "shared": 1, "ffn": 99}),
    ("sequence", {"k": 1, "widths": (8,) * 8, "balance_rate": 0.001}),
]


@pytest.mark.parametrize(("router", "changes"), RIGHT, ids=str)
def test_what_routers_can_do_together(router, changes):
    spec = configs.from_mapping(moe_config(router, **changes)).model.spec()
    assert spec.moe_layers == (1, 3, 5)
    for name, value in changes.items():
        assert getattr(spec.moe, name) == value


def test_keys_of_experts_mean_nothing_to_a_dense_encoder():
    assert configs.from_mapping(moe_config("none", k=9)).model.spec().moe_layers == ()


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
        mesh__data=1,
        compute__precision="float32",
        checkpoint__every=7,
        log__every=3,
        log__profile="2:3",
    )
    assert configs.fingerprint(first, "d") == configs.fingerprint(same, "d")
    assert configs.fingerprint(first, "d") != configs.fingerprint(first, "other data")
    for section in dataclasses.fields(Config):
        if section.name in ("mesh", "compute", "checkpoint", "log"):
            continue
        part = getattr(first, section.name)
        if not dataclasses.is_dataclass(part):
            other = dataclasses.replace(first, **{section.name: part + 1})
            assert configs.fingerprint(other, "d") != configs.fingerprint(first, "d")
    assert configs.fingerprint(tiny_config(train__lr=1e-4), "d") != configs.fingerprint(first, "d")


def test_the_updates_to_trace():
    assert tiny_config().log.window is None
    assert tiny_config(log__profile="2:12").log.window == (2, 12)


def test_a_config_from_before_traces_is_the_same_run():
    tree = configs.to_dict(tiny_config())
    del tree["log"]["profile"]
    assert configs.from_mapping(tree) == tiny_config()


def test_a_config_survives_json():
    first = tiny_config()
    again = configs.from_mapping(json.loads(json.dumps(configs.to_dict(first))))
    assert again == first


def earlier(**changes) -> dict:
    """A config as versions wrote it that had neither dropout nor a start of the routers' scale."""
    tree = configs.to_dict(tiny_config(**changes))
    for name in DROPOUTS:
        del tree["model"][name]
    del tree["model"]["moe"]["l2_scale"]
    tree["compute"]["remat"] = False
    return tree


SOFT = {"model__moe__router": "soft", "model__moe__l2": True}


@pytest.mark.parametrize(("remat", "name"), [(False, "none"), (True, "full")])
def test_a_switch_of_earlier_versions_is_a_name_now(remat, name):
    tree = earlier()
    tree["compute"]["remat"] = remat
    assert configs.from_mapping(tree).compute.remat == name


@pytest.mark.parametrize(("changes", "scale"), [(SOFT, 1.0), ({}, None)], ids=["l2", "none"])
def test_a_run_of_an_earlier_version_goes_on_as_it_was(changes, scale):
    """And has the fingerprint that it had: the new keys add nothing to it."""
    config = configs.from_mapping(earlier(**changes))
    assert config.model.moe.l2_scale == scale and not config.model.spec().drops
    identity = configs.identity(config, "d")
    added = {"model.moe.l2_scale", *(f"model.{name}" for name in DROPOUTS)}
    assert not added & identity.keys() and "model.moe.l2" in identity
    assert configs.encoder_of_run(earlier(**changes)["model"]) == config.model.spec()
    dropped = dataclasses.replace(config.model, hidden_dropout=0.1)
    other = dataclasses.replace(config, model=dropped)
    assert configs.fingerprint(other, "d") != configs.fingerprint(config, "d")


def test_encoders_from_before_learned_positions_are_what_they_were():
    """Their config, fingerprint and what identifies them as models have nothing of the new keys."""
    config = tiny_config()
    new = {"learned_positions": 300, "embedding_norm": True, "post_norm": True}
    tree = configs.to_dict(config)
    for name in new:
        del tree["model"][name]
        assert f"model.{name}" not in configs.identity(config, "d")
    assert configs.from_mapping(tree) == config
    assert configs.encoder_of_run(tree["model"]) == config.model.spec()
    assert not new.keys() & configs.stored_encoder(config.model.spec()).keys()
    for name, value in new.items():
        other = tiny_config(**{f"model__{name}": value})
        assert configs.fingerprint(other, "d") != configs.fingerprint(config, "d")
        spec = other.model.spec()
        assert configs.encoder_from_mapping(configs.stored_encoder(spec)) == spec


def test_rows_are_no_longer_than_positions_are_learned():
    with pytest.raises(UserError, match=r"data.length=256: expected at most .*\(200\)"):
        tiny_config(model__learned_positions=200)
    with pytest.raises(UserError, match="model.learned_positions=-1: expected 0 .rotary"):
        tiny_config(model__learned_positions=-1)


def test_a_normalised_router_of_today_starts_with_logits_of_standard_deviation_one():
    today, then = tiny_config(**SOFT), configs.from_mapping(earlier(**SOFT))
    assert (today.model.moe.l2_scale, then.model.moe.l2_scale) == (None, 1.0)
    assert configs.fingerprint(today, "d") != configs.fingerprint(then, "d")
    spec = today.model.spec()
    assert spec.moe.initial_scale(spec.d_model) == spec.d_model**0.5
    assert then.model.spec().moe.initial_scale(spec.d_model) == 1.0


@pytest.mark.parametrize("router", ["none", *FAMILIES])
def test_the_flat_section_and_the_family_say_the_same(router):
    section = tiny_config(model__moe__router=router).model.moe
    assert MoEConfig.of(section.spec()).spec() == section.spec()
    spec = tiny_config(model__moe__router=router).model.spec()
    assert configs.encoder_from_mapping(configs.encoder_to_mapping(spec)) == spec
