"""One training step (forward, backward, update), ours or that of transformers' EsmForMaskedLM.

Tokens are positions of the rows, in tokens/s and FLOPs alike: 7 % of rows of 256 are padding.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_ablm.model.families import RowShape
from moe_ablm.model.flops import train_flops_per_token
from moe_ablm.model.spec import EncoderSpec, Execution
from moe_ablm.training.peaks import data_sheet_peak

MASK, PAD = 32, 1  # tokens
WARM, ROUNDS, ROUND_SECONDS = 3, 5, 0.3  # untimed steps; rounds and how long one takes at least


class Rows(NamedTuple):
    """Shape of a batch: number and length of its rows, and residues of the shortest and longest."""

    count: int
    length: int = 256
    residues: tuple[int, int] = (225, 250)


def make_batch(rows: Rows) -> dict[str, np.ndarray]:
    """Random antibodies in two chains, 15 % of the residues masked, padding at the end."""
    rng = np.random.default_rng(0)
    shape = rows.count, rows.length
    low, high = rows.residues
    place, end = np.arange(rows.length), rng.integers(low, high + 1, (rows.count, 1))
    here = place < end
    targets = np.where(here, rng.integers(4, 24, shape), PAD)
    loss_mask = here & (rng.random(shape) < 0.15)
    return {
        "tokens": np.where(loss_mask, MASK, targets).astype(np.uint8),
        "targets": targets.astype(np.uint8),
        "loss_mask": loss_mask,
        "segment": (here * (1 + (place > end // 2))).astype(np.uint8),
        "region": (here * rng.integers(0, 8, shape)).astype(np.uint8),
    }


def median_seconds(work: Callable[[], Any], wait: Callable[[], Any]) -> float:
    """Seconds of a call of `work`: median of rounds, each waited for as a whole by `wait`."""

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            work()
        wait()
        return (time.perf_counter() - start) / calls

    seconds(WARM)
    calls = max(1, math.ceil(ROUND_SECONDS / seconds(1)))
    return statistics.median(seconds(calls) for _ in range(ROUNDS))


def speed(seconds: float, spec: EncoderSpec, rows: Rows, kind: str, devices: int = 1) -> dict:
    """What the time of a step means: milliseconds, tokens/s, TFLOP/s, share of the data sheet."""
    tokens = rows.count * rows.length / seconds
    flops = tokens * train_flops_per_token(spec, RowShape(rows.length, rows.length)) / devices
    peak = data_sheet_peak(kind, "bfloat16")
    share = {"peak_share": flops / peak} if peak else {}
    return {"ms": 1e3 * seconds, "tokens_per_second": tokens, "tflops": flops / 1e12, **share}


class OurStep:
    """The trainer's own step on all devices, from tracing to timing."""

    def __init__(
        self, spec: EncoderSpec, execution: Execution, rows: Rows, optimizer: str = "adamw"
    ):
        import jax

        from moe_ablm.model.encoder import make_definition
        from moe_ablm.parallel.mesh import batch_sharding, make_mesh
        from moe_ablm.training import state as states
        from moe_ablm.training.optimizer import make_optimizer
        from moe_ablm.training.spec import OptimizerSpec
        from moe_ablm.training.step import make_train_step

        self.spec, self.execution, self.rows = spec, execution, rows
        settings = OptimizerSpec(
            *(1000, 1e-4, 10, "linear", 0.1, 0.9, 0.98, 1e-6, 0.01, 1.0), optimizer=optimizer
        )
        start, mesh = time.perf_counter(), make_mesh(-1, 1, 1)
        definition = make_definition(spec, execution)
        made = make_optimizer(settings)
        step = jax.jit(make_train_step(definition, made, spec, 1, 0.0), donate_argnums=0)
        self._state = states.abstract_state(spec, made, False, mesh)
        self._sharding = batch_sharding(mesh)
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._sharding),
            make_batch(rows),
        )
        with jax.set_mesh(mesh):
            self._lowered = step.lower(self._state, batch)
        self._traced = time.perf_counter() - start

    def compile(self) -> Any:
        """The compiled step; may be called in a thread."""
        return self._lowered.compile()

    def work(self, compiled: Any) -> Callable[[], Any]:
        """A function that makes one update and returns its metrics, which may not be there yet."""
        import jax

        state = random_state(self._state)
        batch = jax.device_put(make_batch(self.rows), self._sharding)

        def update():
            nonlocal state
            state, metrics = compiled(state, batch)
            return metrics

        return update

    def measure(self, compiled: Any, trace: Path | None = None) -> dict:
        """Speed, memory and settings; with `trace`, a profile of three steps is written there."""
        import jax

        update, metrics = self.work(compiled), None

        def work():
            nonlocal metrics
            metrics = update()

        seconds = median_seconds(work, lambda: jax.block_until_ready(metrics))
        if trace is not None:
            with jax.profiler.trace(str(trace)):
                for _ in range(3):
                    work()
                jax.block_until_ready(metrics)
        objective = float(metrics.objective)
        if not math.isfinite(objective):
            raise FloatingPointError(f"the objective is {objective}")
        device = jax.devices()[0].device_kind
        memory = compiled.memory_analysis()
        return {
            **speed(seconds, self.spec, self.rows, device, jax.device_count()),
            "temporaries_gb": memory.temp_size_in_bytes / 1e9,
            "arguments_gb": memory.argument_size_in_bytes / 1e9,
            "trace_s": self._traced,
            "objective": objective,
            "config": settings(self.spec, self.rows) | {"execution": asdict(self.execution)},
        }


def random_state(shapes: Any) -> Any:
    """A state of these shapes: N(0, 0.02^2) for weights, ones for scales, else zeros.

    As the trainer's own, without compiling a program for every encoder.
    """
    import jax
    import jax.numpy as jnp

    def value(path, x):
        name = jax.tree_util.keystr(path)
        if "scale" in name:
            made = jnp.ones(x.shape, x.dtype)
        elif len(x.shape) > 1:
            made = 0.02 * jax.random.normal(jax.random.key(len(name)), x.shape, x.dtype)
        else:
            made = jnp.zeros(x.shape, x.dtype)
        return jax.device_put(made, x.sharding)

    def zeros(x):
        return jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding)

    params = jax.tree_util.tree_map_with_path(value, shapes.params)
    return jax.tree.map(zeros, shapes._replace(params=None))._replace(params=params)


def settings(spec: EncoderSpec, rows: Rows) -> dict:
    """What a step was measured with, for JSON."""
    router = {"router": spec.moe.name} if spec.moe else {}
    return {"spec": asdict(spec) | router, "rows": rows._asdict()}


class TorchStep:
    """`EsmForMaskedLM` with SDPA, clipping and fused AdamW."""

    def __init__(self, shape: tuple[int, int, int, int], batch: dict[str, np.ndarray], device: str):
        """Args: layers, D, F, H; of `make_batch`; "cuda" or "cpu"."""
        import torch
        from transformers import EsmConfig, EsmForMaskedLM

        layers, d_model, ffn, heads = shape
        config = EsmConfig(
            vocab_size=33,
            mask_token_id=MASK,
            pad_token_id=PAD,
            hidden_size=d_model,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=ffn,
            position_embedding_type="rotary",
            token_dropout=True,
            emb_layer_norm_before=False,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa",
        )
        self._device = device
        self._model = EsmForMaskedLM(config).to(device).train()
        self._parameters = list(self._model.parameters())
        self._optimizer = torch.optim.AdamW(
            self._parameters, 1e-4, (0.9, 0.98), 1e-6, weight_decay=0.01, fused=True
        )
        targets = batch["targets"].astype(np.int64)
        arrays = {
            "input_ids": batch["tokens"].astype(np.int64),
            "attention_mask": (batch["segment"] > 0).astype(np.int64),
            "labels": np.where(batch["loss_mask"], targets, -100),
        }
        self._batch = {name: torch.from_numpy(x).to(device) for name, x in arrays.items()}

    def work(self, dtype: str, compiled: bool = False) -> Callable[[], None]:
        """A function that makes one update.

        Args:
          dtype: "bfloat16" for autocast, else "float32".
          compiled: by `torch.compile`.
        """
        import torch

        model = torch.compile(self._model) if compiled else self._model

        def update():
            with torch.autocast(self._device, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = model(**self._batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

        return update


def measure_torch(shape: tuple[int, int, int, int], rows: Rows, compiled: bool) -> dict:
    """Speed of transformers' step in bfloat16 on the GPU, or on the CPU where there is none."""
    import torch

    cuda = torch.cuda.is_available()
    torch.compiler.reset()  # what was compiled before keeps its model
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    update = TorchStep(shape, make_batch(rows), "cuda" if cuda else "cpu").work(
        "bfloat16", compiled
    )
    start = time.perf_counter()
    update()
    first = time.perf_counter() - start
    seconds = median_seconds(update, torch.cuda.synchronize if cuda else lambda: None)
    spec = EncoderSpec(*shape)
    return {
        **speed(seconds, spec, rows, torch.cuda.get_device_name() if cuda else "cpu"),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        "first_s": first,
        "config": settings(spec, rows) | {"compiled": compiled, "autocast": "bfloat16"},
    }
