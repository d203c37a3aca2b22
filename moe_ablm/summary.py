"""What a run remembers of itself, and the summary it leaves in `run.json`."""

import os
import platform
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from moe_ablm import config as configs
from moe_ablm.config_schema import Config
from moe_ablm.feed import Feed
from moe_ablm.model import flops
from moe_ablm.model.spec import PRECISIONS, Execution
from moe_ablm.program import FLAGS, HARDWARE
from moe_ablm.results import commit, versions
from moe_ablm.training.device import Peak, peak_memory, processor
from moe_ablm.training.state import TrainState, params_sha256

# what decides numbers: the same seed ends elsewhere with others
PACKAGES = ("moe_ablm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclass
class RunRecord:
    """What must survive a restart beside the arrays; saved with every checkpoint."""

    tokens_seen: int = 0
    # where the number of a token's experts varies: how many computed, over how many tokens
    choices: float = 0.0
    choices_of: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    stale_evaluations: int = 0
    collapsed: bool = False  # and given up
    evaluation: dict[str, Any] = field(default_factory=dict)  # of the newest, with its "step"
    stability: dict[str, Any] = field(default_factory=dict)  # state of the stability watch

    def count_choices(self, choices: float, tokens: int) -> None:
        """Counts an update of `tokens` that had so many experts on average."""
        self.choices += choices * tokens
        self.choices_of += tokens

    @property
    def mean_choices(self) -> float | None:
        """Experts that computed for a token on average; None: not counted."""
        return self.choices / self.choices_of if self.choices_of else None


def run_summary(
    config: Config,
    feed: Feed,
    state: TrainState,
    record: RunRecord,
    status: str,
    stability: dict[str, Any],
    tokens_per_second: float | None,
    train_loss: float | None,
) -> dict[str, Any]:
    """The content of `run.json`.

    Args:
      config, feed: of the run.
      state, record: at its end.
      status: how it ended, as `outcome` has it.
      stability: the stability watch's summary.
      tokens_per_second: mean of this process.
      train_loss: mean of the last logged training losses.
    """
    spec = config.model.spec()
    per_token = flops.train_flops_per_token(spec, feed.row, record.mean_choices)
    return {
        "fingerprint": configs.fingerprint(config, feed.identity),
        "status": status,
        "step": int(state.step),
        "params_sha256": params_sha256(state.params),
        "params_total": flops.params_total(spec),
        "params_active": flops.params_active(spec, record.mean_choices),
        "corpus_tokens": feed.corpus_tokens,
        "unique_tokens": feed.mixture.unique_tokens(int(state.step)),
        "tokens_seen": record.tokens_seen,
        "flops": record.tokens_seen * per_token,
        "seed": config.seed,
        "size": config.model.size,
        "data_fraction": config.data.fraction,
        "router": config.model.moe.router,
        "experts": spec.moe.experts if spec.moe else 1,
        "choices": record.mean_choices,
        "train_loss_final": train_loss,
        "valid_loss_final": record.evaluation.get("loss"),
        "valid_loss_best": record.best_loss,
        "valid_step_best": record.best_step,
        "valid_loss_by_region": record.evaluation.get("loss_by_region"),
        "valid_loss_by_chain": record.evaluation.get("loss_by_chain"),
        "valid_loss_novel": record.evaluation.get("loss_novel"),
        "valid_seen": feed.seen_shares,
        "stability": stability,
        "evaluation": record.evaluation,
        "tokens_per_second": tokens_per_second,
        "peak_memory": peak_memory(),
    }


def execution_summary(
    execution: Execution, mesh: Mesh, peak: Peak, compile_seconds: float | None
) -> dict[str, Any]:
    """`execution` in `run.json`: what computed the run, or its last part, and how.

    Outside the run's identity. `hardware_name` is the name that a launcher left in the environment.
    """
    types = (execution.activations, execution.operands)
    return {
        "hardware_name": os.environ.get(HARDWARE) or None,
        "device_kind": jax.devices()[0].device_kind,
        "devices": mesh.size,
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
        "precision": next(name for name, known in PRECISIONS.items() if known == types),
        **asdict(execution),
        "flags": " ".join(filter(None, map(os.environ.get, FLAGS))),
        "matmul_peak": peak.flops,
        "matmul_peak_source": peak.source,
        "compile_seconds": compile_seconds,
        "processor": processor(),
        "versions": {"python": platform.python_version(), **versions(*PACKAGES)},
        "commit": commit(),
    }


def recent_train_loss(lines: list[dict], steps: int) -> float | None:
    """Mean training loss over the log lines of the last tenth of `steps`; None without any."""
    losses = [x["loss"] for x in lines if x["kind"] == "train" and x["step"] > 0.9 * steps]
    return sum(losses) / len(losses) if losses else None
