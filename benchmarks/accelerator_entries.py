"""What `accelerator.py` measures, wave by wave, most wanted first."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import exactness
import real_trainer
from steps import OurStep, Rows, measure_torch
from waves import Entry, Prepared, Wave

from moe_ablm.model.experts import IMPLEMENTATIONS
from moe_ablm.model.families import ExpertChoice, Soft, TopK
from moe_ablm.model.spec import SIZES, EncoderSpec, Execution
from moe_ablm.training.device import device_memory
from moe_ablm.training.execution import make_execution
from moe_ablm.training.memory import abstract_mesh, fitting_remat

K = 2  # experts a token
EVERYWHERE = {"experts": 8, "placement": "every", "first_dense": 0}
TOP2 = TopK(k=K, **EVERYWHERE)
LIMITED = {
    "capacity": replace(TOP2, capacity=1.25),
    "expert-choice": ExpertChoice(k=K, **EVERYWHERE),
    "soft": Soft(slots=64, **EVERYWHERE),
}
DROPOUT = {"attention_dropout": 0.1, "hidden_dropout": 0.1, "embedding_dropout": 0.1}


@dataclass(frozen=True)
class Scale:
    """How large everything is, and how long it is expected to take.

    Attributes:
      shapes: layers, D, F, H of the encoders, by size.
      rows: of a batch, by size.
      sparse: layers and rows of the encoders with experts, by size.
      trainer: flags of the trainer's run, and seconds that it trains.
      compiles: seconds that a step compiles, by size.
      runs: seconds that a step, a check and a step of torch take.
    """

    shapes: dict[str, tuple[int, int, int, int]]
    rows: dict[str, Rows]
    sparse: dict[str, tuple[int, Rows]]
    trainer: tuple[dict[str, object], float]
    compiles: dict[str, float]
    runs: tuple[float, float, float]


REAL = Scale(
    shapes=SIZES,
    rows={n: Rows(r) for n, r in zip(SIZES, (512, 256, 128, 128, 64), strict=True)},
    # 150m's widths in a third of its layers: a ratio to a dense encoder hardly depends on them
    sparse={"35m": (12, Rows(128)), "150m": (10, Rows(128))},
    trainer=({"model.size": "35m", "train.batch": 256, "train.warmup": 200}, 45),
    compiles=dict(zip(SIZES, (30, 40, 70, 80, 110), strict=True)),
    runs=(6, 3, 12),
)
_SMALL = Rows(4, 64, (50, 60))
_TINY_MODEL = {
    "model.size": "tiny", "model.layers": 2, "model.d_model": 16, "model.ffn": 32,
    "model.heads": 2, "data.simulated_pairs": 400, "train.batch": 8, "train.warmup": 3,
    "train.lr": 3e-3, "log.every": 1,
}  # fmt: skip
TINY = Scale(
    shapes={"8m": (2, 32, 64, 2), "35m": (2, 48, 96, 2)},
    rows={"8m": _SMALL, "35m": _SMALL},
    sparse={"35m": (2, _SMALL)},
    trainer=(_TINY_MODEL, 5),
    compiles={"8m": 5, "35m": 5},
    runs=(4, 4, 4),
)


def waves(scale: Scale, data: Path | None, trace: Path | None) -> list[Wave]:
    """All entries; steps of a wave are compiled side by side.

    Args:
      scale: of everything.
      data: prepared dataset of the trainer's run; None: it simulates one.
      trace: folder for profiles; None: there are none.
    """
    ours, theirs = OurSteps(scale, trace), partial(_torch, scale)
    sizes = list(scale.shapes)
    first, large = ([n for n in sizes if (n in ("350m", "650m")) == big] for big in (False, True))
    sparse = {size: ours.sparse(size) for size in scale.sparse}
    base = sparse["35m"]
    return [
        [Entry(name, "jax", 0, scale.runs[1], work) for name, work in exactness.CHECKS.items()],
        [*(ours.dense(size) for size in first), *base[:-2]],
        [*(ours.dense(size) for size in large[::-1]), *base[-2:]],
        *([theirs(size, False)] for size in sizes),
        *(sparse[size] for size in sparse if size != "35m"),
        [_trainer(scale, data)],
        [ours.variant("35m", name) for name in ("dropout", "none", "full", "matmuls-scan")],
        *([theirs(size, True)] for size in sizes),
        [ours.variant("35m", name) for name in ("none-scan", "full-scan")],
        [
            ours.variant(n, v)
            for n in ("150m", "650m")
            if n in sizes
            for v in ("full", "matmuls-scan")
        ],
    ]


class OurSteps:
    """Entries that time the project's own step."""

    def __init__(self, scale: Scale, trace: Path | None):
        self._scale, self._trace = scale, trace

    def dense(self, size: str) -> Entry:
        """A dense encoder as the trainer runs it."""
        spec, rows = EncoderSpec(*self._scale.shapes[size]), self._scale.rows[size]
        return self._entry(f"dense/{size}", size, spec, rows)

    def variant(self, size: str, variant: str) -> Entry:
        """A dense encoder with dropout, or with a remat policy, under a scan or unrolled."""
        spec, rows = EncoderSpec(*self._scale.shapes[size]), self._scale.rows[size]
        if variant == "dropout":
            return self._entry(f"dense/{size}/dropout", size, replace(spec, **DROPOUT), rows)
        remat, _, scan = variant.partition("-")
        how = {"remat": remat, "scan": bool(scan)}
        return self._entry(f"dense/{size}/{variant}", size, spec, rows, **how)

    def sparse(self, size: str) -> list[Entry]:
        """Experts in every layer, and a dense encoder of the active FLOPs of top-2."""
        layers, rows = self._scale.sparse[size]
        _, d, f, heads = self._scale.shapes[size]
        spec = EncoderSpec(layers, d, f, heads)
        entry = partial(self._entry, size=size, rows=rows)
        return [
            entry(f"sparse/{size}/dense", spec=replace(spec, ffn=K * f)),
            *(
                entry(f"sparse/{size}/dropless-{name}", spec=replace(spec, moe=TOP2), grouped=name)
                for name in IMPLEMENTATIONS
            ),
            *(
                entry(f"sparse/{size}/{name}", spec=replace(spec, moe=moe))
                for name, moe in LIMITED.items()
            ),
        ]

    def _entry(self, name: str, size: str, spec: EncoderSpec, rows: Rows, **how) -> Entry:
        trace = self._trace and self._trace / name.replace("/", "-")

        def work() -> Prepared:
            step = OurStep(spec, execution(spec, rows, **how), rows)
            return Prepared(step.compile, partial(step.measure, trace=trace))

        return Entry(name, "jax", self._scale.compiles[size], self._scale.runs[0], work)


def execution(
    spec: EncoderSpec,
    rows: Rows,
    remat: str | None = None,
    scan: bool | None = None,
    grouped: str | None = None,
) -> Execution:
    """How the trainer would compute on this machine, unless something else is asked for."""
    import jax

    made = make_execution("auto", scan, remat, jax.default_backend())
    memory = device_memory()
    if remat is None and memory is not None:
        shape = rows.count // jax.device_count(), rows.length
        mesh = abstract_mesh(jax.device_count(), 1, 1)
        made = fitting_remat(spec, made, mesh, shape, memory)
    return replace(made, grouped=grouped)


def _torch(scale: Scale, size: str, compiled: bool) -> Entry:
    name = f"torch/{size}/compile" if compiled else f"torch/{size}"
    work = partial(measure_torch, scale.shapes[size], scale.rows[size], compiled)
    return Entry(name, "torch", scale.compiles[size] if compiled else 0, scale.runs[2], work)


def _trainer(scale: Scale, data: Path | None) -> Entry:
    values, seconds = scale.trainer
    run = real_trainer.Run(real_trainer.flags(data, values), seconds, 4 * seconds + 60)
    # beside training: data, compilation, a checkpoint
    return Entry("trainer", "trainer", 0, 2 * seconds, partial(real_trainer.measure, run))
