"""A sixth router family that nothing but this file knows, through all that a family goes through.

Its class tells everything that the rest of the code asks; its plan function is registered below.
"""

import signal
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from flax import nnx
from small_datasets import random_records, write_dataset
from test_flops import matmul_flops

from moe_ablm import config as configs
from moe_ablm import trainer
from moe_ablm.config_schema import MoEConfig
from moe_ablm.data.antibody import row_of
from moe_ablm.data.tokenizer import LAYOUTS
from moe_ablm.errors import UserError
from moe_ablm.evaluation.routing import Settings, evaluate
from moe_ablm.evaluation.subject import Subject
from moe_ablm.inference.antibodies import given
from moe_ablm.inference.buckets import Engine
from moe_ablm.inference.route import route, table
from moe_ablm.inference.score import score
from moe_ablm.interop.load import load_model
from moe_ablm.interop.saved import save_model
from moe_ablm.model import flops, routers
from moe_ablm.model.encoder import Encoder
from moe_ablm.model.families import FAMILIES, Router, RowShape
from moe_ablm.model.routing import Plan, token_sums
from moe_ablm.model.spec import EncoderSpec, Execution
from moe_ablm.training import memory
from moe_ablm.training.stability import signals_of

E = 4
ESM = LAYOUTS["esm"]


@dataclass(frozen=True, kw_only=True)
class ByPosition(Router):
    """Every token takes the expert of its position in its antibody, modulo E, by its gate."""

    name: ClassVar[str] = "by_position"
    token_choice: ClassVar[bool] = True

    gate: str = "softmax"

    @property
    def choices(self) -> int:
        return 1

    @property
    def active_share(self) -> float:
        return 1 / self.experts

    def computed(self, row: RowShape, training: bool) -> float:
        return 1.0


@routers.plan.register
def _(spec: ByPosition, logits, tokens, balance=None, training=False):
    antibody = tokens.valid.astype(int) if tokens.antibody is None else tokens.antibody
    earlier = jnp.tril(antibody[:, :, None] == antibody[:, None, :], -1)
    chosen = jnp.where(tokens.valid, earlier.sum(-1) % spec.experts, spec.experts)[..., None]
    wanted = routers.affinity(logits, spec.gate)
    one_hot = jax.nn.one_hot(chosen, spec.experts, dtype=logits.dtype)
    gates = (wanted.gates[:, :, None] * one_hot).sum(-1)
    plan = Plan(chosen.astype(jnp.int32), gates, None)
    load = plan.assigned(spec.experts)
    return plan, token_sums(logits, wanted.distribution, load, load, tokens.valid, tokens.valid)


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, ByPosition.name, ByPosition)
        yield


def config(**changes):
    return tiny_config(model__moe__router="by_position", model__moe__experts=E, **changes)


def encoder_spec(**changes) -> EncoderSpec:
    return config(**changes).model.spec()


def test_the_door_of_the_config():
    spec = encoder_spec(model__moe__shared=1)
    assert spec.moe == ByPosition(experts=E, shared=1)
    assert MoEConfig.of(spec.moe).spec() == spec.moe
    assert configs.encoder_from_mapping(configs.encoder_to_mapping(spec)) == spec
    with pytest.raises(UserError, match="capacity=1.0: expected None .*'by_position'"):
        encoder_spec(model__moe__capacity=1.0)


def test_a_class_without_a_plan_is_named():
    @dataclass(frozen=True, kw_only=True)
    class Unregistered(Router):
        name: ClassVar[str] = "unregistered"

    tokens = routers.Tokens(jnp.ones((1, 2), bool))
    with pytest.raises(NotImplementedError, match="Unregistered"):
        routers.plan(Unregistered(), jnp.zeros((1, 2, 8)), tokens)


def test_parameters_and_flops():
    spec, (b, length) = encoder_spec(), (2, 128)
    module = nnx.eval_shape(lambda: Encoder(spec, Execution(), nnx.Rngs(0)))
    definition, params = nnx.split(module)
    assert flops.params_total(spec) == sum(x.size for x in jax.tree.leaves(params))
    idle = (E - 1) * flops.ffn_params(spec, spec.ffn)
    assert flops.params_active(spec) == flops.params_total(spec) - idle

    def loss(p, t, v):
        return nnx.merge(definition, p)(t, v, None, True).logits.sum()

    inputs = [jax.ShapeDtypeStruct((b, length), kind) for kind in (jnp.int32, bool)]
    program = jax.make_jaxpr(loss)(params, *inputs).jaxpr
    counted = flops.forward_flops_per_token(spec, RowShape(length, length), training=True)
    assert matmul_flops(program, trips=b) == counted * b * length  # a full block of 128 rows each


def test_stability_and_memory():
    names = {signal.name for signal in signals_of(ByPosition(experts=8))}
    assert names == {"logit_rms", "load_entropy", "max_min_load", "dead_experts"}
    spec = encoder_spec()
    kept = memory.activation_bytes(spec, Execution(), 32)
    assert 0 < kept.largest < kept.rest + kept.layers
    params, _ = memory.state_bytes(spec, memory.abstract_mesh(1, 1, 1))
    assert params == 4 * flops.params_total(spec)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of twelve steps, ended at the sixth and gone on with."""
    workdir = tmp_path_factory.mktemp("family") / "w"
    saved = trainer.Trainer._save

    def save_and_signal(self, state):
        saved(self, state)
        if self.step == 6:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "_save", save_and_signal)
        assert trainer.run(config(), workdir)["status"] == "stopped"
    return workdir, trainer.run(config(), workdir)


def test_it_trains_and_is_loaded(trained, tmp_path):
    workdir, summary = trained
    assert (summary["status"], summary["router"], summary["step"]) == (
        "complete",
        "by_position",
        12,
    )
    assert summary["train_loss_final"] < 3.4 and summary["choices"] is None
    model = load_model(workdir)
    assert model.spec == encoder_spec()
    save_model(model, tmp_path / "saved")
    assert load_model(tmp_path / "saved").digest() == model.digest()


def test_it_is_asked(trained, tmp_path):
    """Scores and routes; experts of residues are those of their positions."""
    engine = Engine(load_model(trained[0]))
    antibodies = given([("EVQLVES", "DIQM"), ("EVQ", "")], ESM, 64)
    for found, antibody in zip(score(engine, antibodies), antibodies, strict=True):
        assert found.shape == (antibody.residues,) and (found < 0).all()
    for found, antibody in zip(route(engine, antibodies), antibodies, strict=True):
        np.testing.assert_array_equal(found.experts[:, 0, 0], row_of(antibody, ESM).places % E)
        assert ((found.gates > 0) & (found.gates < 1)).all()
    assert table(engine, antibodies).num_rows == sum(a.residues for a in antibodies)


def test_its_specialisation_is_evaluated(trained, tmp_path):
    records = random_records(30, seed=4, shortest=11, longest=14)
    dataset = write_dataset(tmp_path / "data", records, split=2)
    subject = Subject(Engine(load_model(trained[0])), dataset, tmp_path)
    outcome = evaluate(subject, Settings(20))
    loads = [s.number(10) for s in outcome.samples if s.metric == "load"]
    assert len(loads) == E and sum(n.value for n in loads) == pytest.approx(1)
    assert all(0.15 < n.value < 0.35 for n in loads)
    assert "without_expert" not in {s.metric for s in outcome.samples}  # every token has one
