"""The settings of the optimizer, as a frozen dataclass."""

from dataclasses import dataclass, field

SCHEDULES = ("linear", "cosine", "wsd", "constant")
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer with clipping and a schedule; keys are explained in configs/base.py."""

    steps: int
    lr: float
    warmup: int
    schedule: str
    decay_share: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip: float
    freeze: int = field(default=0, kw_only=True)
    restarts: tuple[int, ...] = field(default=(), kw_only=True)
    optimizer: str = field(default="adamw", kw_only=True)
    muon_lr: float = field(default=0.02, kw_only=True)
    router_lr: float = field(default=1.0, kw_only=True)
    skip_spikes: float = field(default=0.0, kw_only=True)

    @property
    def cycles(self) -> tuple[int, ...]:
        """Steps of each course of the schedule: one more than there are restarts."""
        ends = (0, *self.restarts, self.steps)
        return tuple(end - start for start, end in zip(ends, ends[1:], strict=False))

    def decay_steps(self, cycle: int = -1) -> int:
        """Steps over which "wsd" decays in a cycle, by default the last."""
        return max(round(self.decay_share * self.cycles[cycle]), 1)

    @property
    def decay_start(self) -> int | None:
        """Updates after which the last decay of "wsd" begins; None with other schedules."""
        return self.steps - self.decay_steps() if self.schedule == "wsd" else None
