"""Models of a few thousand parameters, with weights large enough to tell residues apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_ablm.data.tokenizer import LAYOUTS
from moe_ablm.inference.buckets import Engine
from moe_ablm.interop.load import Model
from moe_ablm.model.encoder import Encoder
from moe_ablm.model.families import ExpertChoice, Sequence, Soft, TopK, TopP
from moe_ablm.model.spec import EncoderSpec, Execution

MOE = {
    "dense": None,
    "topk": TopK(experts=4, placement="every", first_dense=0),
    "topp": TopP(experts=4, k=3, threshold=0.6, placement="every", first_dense=0),
    "expert_choice": ExpertChoice(experts=4, capacity=0.25, placement="every", first_dense=0),
    "expert_choice batch": ExpertChoice(experts=4, group="batch", placement="every", first_dense=0),
    "pads routed": ExpertChoice(experts=4, group="batch", pads="probabilities,aux"),
    "soft": Soft(experts=4, slots=3, placement="every", first_dense=0),
    "sequence": Sequence(experts=4, placement="every", first_dense=0),
}
HEAVY = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVY"
    "YCAKDRGYSYGFDYWGQGTLVTVSS"
)
LIGHT = (
    "DIQMTQSPSSLSASVGDRVTITCRASQSISSYLNWYQQKPGKAPKLLIYAASSLQSGVPSRFSGSGSGTDFTLTISSLQPEDFATYYCQQSYST"
    "PLTFGGGTKVEIK"
)
# pairs of unequal lengths, single chains, a nanobody-like short one, an ambiguous residue
MIXED = [(HEAVY, LIGHT), (HEAVY, ""), ("", LIGHT), ("EVQLX", "DIQ"), (HEAVY[:40], LIGHT[5:60])]


def tiny_spec(router: str = "dense", **changes) -> EncoderSpec:
    """Two layers of width 16."""
    values = {"layers": 2, "d_model": 16, "ffn": 32, "heads": 2, "moe": MOE[router]} | changes
    return EncoderSpec(**values)


def tiny_model(router: str = "dense", layout: str = "esm", length: int = 320, **changes) -> Model:
    """A model with random weights, biases and norms included."""
    spec = tiny_spec(router, **changes)
    params = nnx.split(Encoder(spec, Execution(), nnx.Rngs(0)))[1]
    draws = np.random.default_rng(0)

    def drawn(x):
        noise = draws.standard_normal(x.shape).astype(np.float32)
        return jnp.asarray(0.3 * noise + (x.ndim == 1) * np.asarray(x))

    params = jax.tree.map(drawn, params)
    return Model(spec, params, LAYOUTS[layout], length, f"tiny {router}")


@functools.cache
def engine(router: str = "dense", **options) -> Engine:
    """One a router and options: what it compiled is used by all tests."""
    return Engine(tiny_model(router), **options)
