"""Published models: their parameters against counts of their own code and counts by hand."""

import itertools

import pytest

from configs import balm_moe, soft_moe_protein
from moe_ablm.config import from_mapping
from moe_ablm.config_schema import Config
from moe_ablm.errors import UserError
from moe_ablm.model import flops

# What BALM's classes have: the sum over `parameters()`, and `count_parameters(only_active=True)`
# (commit 36a8001, vocabulary 32)
BALM = {
    "model=pilot,capacity=0.25,shared=0": (559_608_512, 44_619_152),
    "model=pilot,capacity=0.5,shared=0": (293_819_072, 44_619_872),
    "model=pilot,capacity=1,shared=0": (160_924_352, 44_621_312),
    "model=pilot,capacity=0.25,shared=1": (160_921_472, 48_772_112),
    "model=pilot,capacity=0.5,shared=1": (127_697_792, 46_696_352),
    "model=pilot,capacity=1,shared=1": (94_474_112, 44_621_312),
    "model=pads": (160_924_352, 44_621_312),
    "model=final": (714_165_792, 197_464_992),
    "model=dense_45m": (44_598_272, 44_598_272),
    "model=dense_200m": (197_388_192, 197_388_192),
    "model=dense_710m": (710_103_072, 710_103_072),
}
# BALM's capacity -> what an expert takes of 64 x 160 tokens, int(capacity * 10240 / experts)
TAKEN = {
    ("0.25", "0"): 320, ("0.5", "0"): 640, ("1", "0"): 1280,
    ("0.25", "1"): 365, ("0.5", "1"): 731, ("1", "1"): 1462,
}  # fmt: skip


def combinations(config) -> list[str]:
    """Every documented argument."""
    if config is soft_moe_protein:
        grids = [({}, soft_moe_protein.CHOICES)]
    else:
        grids = [({"model": m}, balm_moe.CHOICES.get(m, {})) for m in balm_moe.SIZES]
    every = []
    for fixed, choices in grids:
        for values in itertools.product(*choices.values()):
            named = fixed | dict(zip(choices, values, strict=True))
            every.append(",".join(f"{name}={value}" for name, value in named.items()))
    return [a for a in every if not ("expert_choice" in a and "l2=1" in a)]


def checked(module, arg: str | None) -> Config:
    return from_mapping(module.get_config(arg))


def counts(module, arg: str | None) -> tuple[int, int]:
    spec = checked(module, arg).model.spec()
    return flops.params_total(spec), flops.params_active(spec)


@pytest.mark.parametrize("arg", BALM)
def test_parameters_are_those_of_balm(arg):
    """But for one more token: a row of the embedding, one of the decoder, and a bias."""
    token = 2 * checked(balm_moe, arg).model.d_model + 1
    assert counts(balm_moe, arg) == tuple(n + token for n in BALM[arg])


@pytest.mark.parametrize("shared", ["0", "1"])
@pytest.mark.parametrize("places", ["0.25", "0.5", "1"])
def test_pilots_differ_in_the_router_alone(places, shared):
    arg = f"capacity={places},shared={shared}"
    found = {counts(balm_moe, f"{arg},router={r}") for r in ("topk", "topp", "expert_choice")}
    assert len(found) == 1


def test_final_model_by_hand():
    """30 layers, D 640, F 2560, V 33; 8 experts in 15 of them, one of which works on a token."""
    attention, norms = 4 * (640 * 640 + 640), 4 * 640
    ffn = 3 * 640 * 2560 + 2 * 2560 + 640
    head = 640 * 640 + 640 + 2 * 640 + 33 * 640 + 33
    rest = 33 * 640 + 30 * (attention + norms) + 15 * ffn + 15 * 640 * 8 + 2 * 640 + head
    assert rest + 15 * 8 * ffn == 714_167_073  # 714.2 M
    assert rest + 15 * 1 * ffn == 197_466_273  # 197.5 M
    assert counts(balm_moe, "model=final") == (714_167_073, 197_466_273)


def test_older_model_by_hand():
    """6 layers, D 960, F 1920; 15 + 1 experts in 3 of them, 6 + 1 of which work on a token."""
    attention, norms = 4 * (960 * 960 + 960), 4 * 960
    expert, biases = 3 * 960 * 1920, 2 * 1920 + 960  # the older model's experts have no biases
    head = 960 * 960 + 960 + 2 * 960 + 33 * 960 + 33
    rest = 33 * 960 + 6 * (attention + norms) + 3 * (expert + biases) + 3 * 960 * 15
    rest += 2 * 960 + head
    assert rest + 3 * 16 * expert == 305_221_473  # 305.22 M
    assert 3 * 16 * biases == 230_400
    total, active = 305_221_473 + 230_400, rest + 3 * 7 * (expert + biases)
    assert active == 156_023_073
    assert counts(balm_moe, "model=older") == (total, active)


def test_soft_moe_protein_by_hand():
    """ESM-2 8M, 7,512,161 parameters, with 8 experts in 3 of its 6 layers."""
    ffn = 2 * 320 * 1280 + 1280 + 320
    esm2 = 33 * 320 + 6 * (4 * (320 * 320 + 320) + 4 * 320 + ffn) + 2 * 320
    esm2 += 320 * 320 + 320 + 2 * 320 + 33
    choice = esm2 + 3 * (7 * ffn + 320 * 8)
    soft = esm2 + 3 * (7 * ffn + 320 * 8 * 64)
    for placement in ("interleaved", "consecutive"):
        arg = f"placement={placement},size=8m"
        assert counts(soft_moe_protein, f"{arg},router=expert_choice")[0] == choice == 24_756_833
        assert counts(soft_moe_protein, f"{arg},router=soft")[0] == soft == 25_240_673
        assert counts(soft_moe_protein, f"{arg},router=soft,l2=1")[0] == soft + 3  # the scales


@pytest.mark.parametrize("arg", [None, *combinations(balm_moe)])
def test_every_balm_argument_is_valid(arg):
    c = checked(balm_moe, arg)
    dense = (arg or "").startswith("model=dense")
    assert c.model.spec().moe_layers == (() if dense else tuple(range(1, c.model.spec().layers, 2)))
    assert (c.model.activation, c.model.tied, c.model.token_dropout) == ("swiglu", False, False)


@pytest.mark.parametrize("arg", [None, *combinations(soft_moe_protein)])
def test_every_soft_moe_protein_argument_is_valid(arg):
    c = checked(soft_moe_protein, arg)
    moe, spec = c.model.moe, c.model.spec()
    layers, depth = spec.moe_layers, spec.layers
    if "every" in (arg or ""):
        assert layers == tuple(range(depth))
    else:
        apart = {b - a for a, b in itertools.pairwise(layers)}
        assert (len(layers), apart) == (depth // 2, {1 if "consecutive" in (arg or "") else 2})
    # a place of a row costs one expert
    taken = moe.slots if moe.router == "soft" else moe.spec().places(c.data.length)
    assert taken * moe.experts == c.data.length


@pytest.mark.parametrize("router", ["topk", "topp", "expert_choice"])
@pytest.mark.parametrize("grid", TAKEN)
def test_experts_take_what_they_take_in_balm(router, grid):
    """Of the 64 rows of 160 tokens that compete; one more where BALM rounds down."""
    c = checked(balm_moe, f"router={router},capacity={grid[0]},shared={grid[1]}")
    tokens = c.train.batch // c.train.accumulate * c.data.length
    exact = float(grid[0]) * tokens / (8 - int(grid[1]))
    assert c.model.moe.spec().places(tokens) == TAKEN[grid] + (exact > TAKEN[grid])


def test_experts_of_the_older_model_take_128_of_320_tokens():
    c = checked(balm_moe, "model=older")
    assert c.model.moe.spec().places(c.data.length) == 128


def test_router_losses_weigh_as_in_balm():
    """BALM: 0.01 times a mean over layers whose balanced value is k, here 6 layers of value 1."""
    topk, topp, choice = (
        checked(balm_moe, f"router={r}").model.moe for r in ("topk", "topp", "expert_choice")
    )
    assert 6 * topk.load_balance == pytest.approx(0.01 * 2)
    assert 6 * topk.z_loss == pytest.approx(0.001) and topk.entropy_loss == 0
    assert 6 * topp.load_balance == pytest.approx(0.01)
    assert 6 * topp.entropy_loss == pytest.approx(1e-4) and topp.z_loss == 0
    assert (choice.load_balance, choice.entropy_loss) == (0, 0)


def test_routers_choose_as_in_balm():
    topk, topp, choice = (
        checked(balm_moe, f"router={r}").model.moe for r in ("topk", "topp", "expert_choice")
    )
    assert (topk.exceed, topk.gate) == (True, "softmax")
    assert (topp.exceed, topp.gate, topp.k) == (False, "softmax", topp.experts)
    assert (choice.exceed, choice.gate, choice.group) == (True, "tokens", "batch")
    older = checked(balm_moe, "model=older").model.moe
    assert (older.gate, older.group) == ("tokens", "sequence")


def test_pad_ablation():
    found = {
        checked(balm_moe, arg).model.moe.spec().policies()
        for arg in combinations(balm_moe)
        if arg.startswith("model=pads")
    }
    one, other = frozenset({"probabilities"}), frozenset({"aux"})
    assert found == {frozenset(), one, other, one | other}
    assert checked(balm_moe, "model=final").model.moe.spec().policies() == one | other


@pytest.mark.parametrize(
    ("module", "arg", "words"),
    [
        (balm_moe, "model=finl", "'finl' .did you mean 'final'"),
        (balm_moe, "modle=final", "'modle=final' .* .did you mean 'model'"),
        (balm_moe, "router=top2", "router='top2'.* topk, topp, expert_choice"),
        (balm_moe, "capacity=2", "capacity='2'.* 1, 0.5, 0.25"),
        (balm_moe, "shared=", "shared='': expected one of 0, 1"),
        (balm_moe, "shared", "'shared' is not understood"),
        (balm_moe, "model=final,router=topk", "'router=topk' is not understood; expected .* model"),
        (balm_moe, "pads=aux", "'pads=aux' is not understood.* router, capacity, shared"),
        (balm_moe, "model=pads,pads=probabilities,aux", "'aux' is not understood"),
        (soft_moe_protein, "router=sof", "'sof' .did you mean 'soft'"),
        (soft_moe_protein, "placement=alternate", "'alternate'.*interleaved, consecutive, every"),
        (soft_moe_protein, "size=9m", "'9m' .did you mean '8m'"),
        (soft_moe_protein, "l2=yes", "l2='yes': expected one of 0, 1"),
        (soft_moe_protein, "router=expert_choice,l2=1", "l2=1 needs router=soft"),
        (soft_moe_protein, "sice=8m", "'sice=8m' .* .did you mean 'size'"),
    ],
)
def test_wrong_arguments(module, arg, words):
    with pytest.raises(UserError, match=words) as error:
        module.get_config(arg)
    assert "\n" not in str(error.value) and arg in str(error.value)
