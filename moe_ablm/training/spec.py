"""The settings of the optimizer, as a frozen dataclass."""

from dataclasses import dataclass, field

SCHEDULES = ("linear", "cosine", "wsd")
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
    optimizer: str = field(default="adamw", kw_only=True)
    muon_lr: float = field(default=0.02, kw_only=True)
    router_lr: float = field(default=1.0, kw_only=True)
    skip_spikes: float = field(default=0.0, kw_only=True)

    @property
    def decay_steps(self) -> int:
        """Steps over which "wsd" decays."""
        return max(round(self.decay_share * self.steps), 1)
