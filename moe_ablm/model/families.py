"""Router families, one frozen dataclass each.

The class of a family has its settings, their checks, its FLOPs and every property by which the
model and its training treat families differently, so that these compare no names of routers. A new
family is a class here, listed in `FAMILIES`, and a plan function in `routers`. Axis letters are
those of `spec`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Self

GROUPS = ("sequence", "batch")
MOST_EXPERTS = 1 << 16  # 256 times as many as in any published layer; a width is listed for each
PADS = ("logits", "probabilities", "aux")  # BALM-MoE's partial policies


@dataclass(frozen=True)
class RowShape:
    """Shape of a row of the batch, from which FLOPs follow.

    Attributes:
      length: L, tokens with padding.
      tokens: mean number of tokens without padding.
      antibodies: mean number of antibodies.
      packed: whether rows hold several antibodies.
    """

    length: float
    tokens: float
    antibodies: float = 1.0
    packed: bool = False

    @property
    def antibody(self) -> float:
        """Mean tokens of an antibody."""
        return self.tokens / self.antibodies


@dataclass(frozen=True, kw_only=True)
class Router:
    """What all router families share: the experts, the layers that have them, the router losses.

    configs/base.py explains every key. The rest of the code reads the class attributes below
    instead of the name.
    """

    name: ClassVar[str]
    gates: ClassVar[tuple[str, ...]] = ("softmax", "sigmoid")  # values of `gate`
    # tokens choose experts: there is a load-balance loss, and no capacity in inference
    token_choice: ClassVar[bool] = False
    # in inference the experts of a token depend on that token alone
    independent: ClassVar[bool] = False
    # the number of experts differs between tokens
    varying: ClassVar[bool] = False
    # there is one decision per antibody, from the mean of its tokens
    per_antibody: ClassVar[bool] = False
    # experts or slots weigh tokens; the entropy of the weights shows whether a dispatch has formed
    weighs_tokens: ClassVar[bool] = False

    experts: int = 8  # E
    ffn: int | None = None
    shared: int = 0
    placement: str = "alternate"
    first_dense: int = 1
    load_balance: float = 0.01
    z_loss: float = 0.001
    entropy_loss: float = 0.0

    # checks

    def problems(self) -> Iterator[tuple[str, str]]:
        """(key, expected values) for every value that is out of range."""
        if not 1 <= self.experts <= MOST_EXPERTS:
            yield "experts", f"1 to {MOST_EXPERTS:,}"
        for key in ("shared", "first_dense", "load_balance", "z_loss", "entropy_loss"):
            if getattr(self, key) < 0:
                yield key, "0 or more"
        if self.ffn is not None and self.ffn < 1:
            yield "ffn", "a positive number or None"

    # structure

    def expert_widths(self, ffn: int) -> tuple[int, ...]:
        """F of every expert, in an encoder whose dense FFNs have width `ffn`."""
        return (self.ffn or ffn,) * self.experts

    @property
    def equal(self) -> bool:
        """Whether all experts have the same width."""
        return True

    @property
    def slots_of_expert(self) -> int:
        """S of soft-MoE; 0: the router has one logit per expert instead of one per slot."""
        return 0

    def initial_scale(self, d_model: int) -> float | None:
        """Initial value of the learned scale of a normalised router; None: it is not normalised."""
        return None

    @property
    def balance_step(self) -> float:
        """Step of the bias of auxiliary-loss-free balancing; 0: there is no bias."""
        return 0.0

    # routing

    @property
    def choices(self) -> int:
        """Largest number of experts of one token: the length of a plan's last axis."""
        return self.experts

    @property
    def in_batch(self) -> bool:
        """Whether all tokens of the batch compete, instead of those of an antibody."""
        return False

    @property
    def noise(self) -> float:
        """Jitter: a training factor of the router's input, from 1 - noise to 1 + noise."""
        return 0.0

    def policies(self) -> frozenset[str]:
        """The pad policies that are on: "excluded", or some of `PADS`."""
        return frozenset({"excluded"})

    def queues(self, training: bool) -> bool:
        """Whether experts take a limited number of tokens."""
        return False

    def travels(self, training: bool, packed: bool) -> bool:
        """Whether every expert has a fixed number of places for each row.

        Tokens can then travel in arrays of fixed shape to the devices that own the experts.
        """
        return self.queues(training) and not self.in_batch and self.equal and not packed

    def alone(self) -> Self:
        """The router for inference: the result of an antibody depends on that antibody alone.

        Experts that choose among all tokens of a batch, and policies that route padding, would make
        it depend on its neighbours.
        """
        return self

    # FLOPs

    def router_params(self, d_model: int) -> int:
        """Number of parameters of one router."""
        return d_model * self.experts

    @property
    def active_share(self) -> float:
        """Share of the experts' parameters that an average token uses in training."""
        raise NotImplementedError

    def computed(self, row: RowShape, training: bool) -> float:
        """Expert rows computed per token, padding not counted as tokens."""
        raise NotImplementedError

    def multiply_adds(self, d_model: int, expert: float, row: RowShape, training: bool) -> float:
        """Multiply-adds of the router and the routed experts per token that is not padding.

        Args:
          d_model: D.
          expert: multiply-adds of the mean expert for one row.
          row: shape of a row of the batch.
          training: whether token choice obeys its capacity.
        """
        return d_model * self.experts + self.computed(row, training) * expert

    # stability

    @property
    def fewest_loaded(self) -> int | None:
        """Experts that carry the load in total collapse; None: loads are equal by construction."""
        return 1

    def most_dropped(self, kept: float, unseen: float) -> float | None:
        """Share of assignments (expert choice: of tokens) that a healthy router may drop.

        None: drops are not judged. `training.stability.Thresholds` explains the arguments.

        Args:
          kept: share of the places that should be filled.
          unseen: how far the healthy range extends from independent experts to identical ones.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class Queued(Router):
    """Families whose experts may take a limited number of tokens."""

    capacity: float | None = None
    group: str = "sequence"
    pads: str = "excluded"
    jitter: float = 0.0
    k: int = 2  # K

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if not 0 < self.k <= self.experts:
            yield "k", f"1 to model.moe.experts ({self.experts})"
        if self.capacity is not None and self.capacity <= 0:
            yield (
                "capacity",
                "more than 0, which would give the experts no slot; or None (dropless)",
            )
        if self.group not in GROUPS:
            yield "group", f"one of {', '.join(GROUPS)}"
        if not 0 <= self.jitter < 1:
            yield "jitter", "0 (off) to below 1"
        if self.pads != "excluded" and self.policies() - set(PADS):
            yield (
                "pads",
                f"excluded, none, or some of {', '.join(PADS)} with commas between",
            )

    @property
    def limit(self) -> float | None:
        """Places of an expert as a multiple of its fair share of assignments; None: unlimited."""
        return self.capacity

    @property
    def in_batch(self) -> bool:
        return self.group == "batch"

    @property
    def noise(self) -> float:
        return self.jitter

    def policies(self) -> frozenset[str]:
        if self.pads == "excluded":
            return frozenset({"excluded"})
        return frozenset(p.strip() for p in self.pads.split(",")) - {"none"}

    def places(self, tokens: float) -> int:
        """C, the places of an expert for `tokens` that compete: ceil(limit * K * tokens / E).

        At least 1 where there are tokens.
        """
        assert self.limit is not None
        # 1e-9: a product such as 0.1 * 30 must not become 4 places because of its last bit
        places = math.ceil(self.limit * self.k * tokens / self.experts - 1e-9)
        return max(places, min(math.ceil(tokens), 1))

    def alone(self) -> Self:
        return replace(self, group="sequence", pads="excluded")

    @property
    def active_share(self) -> float:
        admitted = 1.0 if self.limit is None else min(self.limit, 1.0)
        return self.k * admitted / self.experts

    def computed(self, row: RowShape, training: bool) -> float:
        if not self.queues(training):
            return float(self.k)
        if self.travels(training, row.packed):  # all places of a row are computed, filled or not
            return self.experts * self.places(row.length) / row.tokens
        # otherwise only admitted tokens are computed
        admitted = self.experts * self.places(row.antibody) / row.antibody
        return min(admitted, self.choices)


@dataclass(frozen=True, kw_only=True)
class TokenChoice(Router):
    """Families in which every token has its own experts."""

    token_choice: ClassVar[bool] = True
    renormalises: ClassVar[bool] = True  # the default of `renormalise` where K > 1

    k: int = 2  # K
    gate: str = "softmax"
    renormalise: bool | None = None
    widths: tuple[int, ...] | None = None
    balance_rate: float = 0.0

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if not 0 < self.k <= self.experts:
            yield "k", f"1 to model.moe.experts ({self.experts})"
        if self.balance_rate < 0:
            yield "balance_rate", "0 or more"
        if self.widths is not None and (
            len(self.widths) != self.experts or min(self.widths, default=0) < 1
        ):
            yield "widths", f"a positive width for each of model.moe.experts ({self.experts})"

    @property
    def renormalised(self) -> bool:
        """Whether the gates of a token sum to 1; by default where K > 1, but not in top-p.

        K > 1 follows Mixtral. At K = 1 a constant gate would give the router no gradient (Switch,
        section 2.1).
        """
        return self.renormalises and self.k > 1 if self.renormalise is None else self.renormalise

    def expert_widths(self, ffn: int) -> tuple[int, ...]:
        return self.widths or super().expert_widths(ffn)

    @property
    def equal(self) -> bool:
        return self.widths is None

    @property
    def balance_step(self) -> float:
        return self.balance_rate

    @property
    def choices(self) -> int:
        return self.k

    @property
    def active_share(self) -> float:
        return self.k / self.experts

    def computed(self, row: RowShape, training: bool) -> float:
        return float(self.k)

    @property
    def fewest_loaded(self) -> int | None:
        return self.k


@dataclass(frozen=True, kw_only=True)
class TopK(Queued, TokenChoice):
    """Every token takes its K best experts (Shazeer et al. 2017)."""

    name: ClassVar[str] = "topk"
    independent: ClassVar[bool] = True

    def queues(self, training: bool) -> bool:
        return training and self.limit is not None

    def most_dropped(self, kept: float, unseen: float) -> float | None:
        return None if self.limit is None else 1 - kept * min(self.limit, 1)


@dataclass(frozen=True, kw_only=True)
class TopP(TopK):
    """Every token takes its best experts until they reach `threshold`, K at most.

    The rule is that of Huang et al. 2024. Without `exceed` a token leaves out the expert that
    crosses the threshold, unless it is the best one (BALM). The number of experts of a token is
    measured in training; `computed` and `active_share` are upper bounds.
    """

    name: ClassVar[str] = "topp"
    varying: ClassVar[bool] = True
    renormalises: ClassVar[bool] = False

    threshold: float = 0.7
    exceed: bool = True

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if not 0 < self.threshold <= 1:
            yield "threshold", "above 0, at most 1"

    @property
    def fewest_loaded(self) -> int | None:
        return 1


@dataclass(frozen=True, kw_only=True)
class Sequence(TokenChoice):
    """All tokens of an antibody take the K best experts of their mean."""

    name: ClassVar[str] = "sequence"
    per_antibody: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class ExpertChoice(Queued):
    """Every expert takes its best tokens; a token has K experts on average (Zhou et al. 2022)."""

    name: ClassVar[str] = "expert_choice"
    gates: ClassVar[tuple[str, ...]] = ("softmax", "sigmoid", "tokens")
    varying: ClassVar[bool] = True
    weighs_tokens: ClassVar[bool] = True

    gate: str = "softmax"

    @property
    def limit(self) -> float | None:
        return 1.0 if self.capacity is None else self.capacity

    def queues(self, training: bool) -> bool:
        return True

    @property
    def fewest_loaded(self) -> int | None:
        return None

    def most_dropped(self, kept: float, unseen: float) -> float | None:
        assert self.limit is not None
        taken = min(self.limit * self.k / self.experts, 1.0)
        independent, same = (1 - taken) ** self.experts, 1 - taken
        return independent + unseen * (same - independent) if independent < same else None


@dataclass(frozen=True, kw_only=True)
class Soft(Router):
    """Slots read weighted means of tokens, and tokens those of slots (Puigcerver et al. 2024)."""

    name: ClassVar[str] = "soft"
    weighs_tokens: ClassVar[bool] = True

    slots: int = 64  # S
    l2: bool = False
    l2_scale: float | None = None
    jitter: float = 0.0

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.slots < 1:
            yield "slots", "a positive number"
        if not 0 <= self.jitter < 1:
            yield "jitter", "0 (off) to below 1"
        if self.l2_scale is not None and (not self.l2 or self.l2_scale <= 0):
            yield "l2_scale", "a positive number with model.moe.l2, else None"

    @property
    def slots_of_expert(self) -> int:
        return self.slots

    def initial_scale(self, d_model: int) -> float | None:
        """sqrt(D) by default, so that logits start with standard deviation 1.

        Cosines of random vectors have standard deviation 1/sqrt(D). Without the scale every slot
        would read the plain mean (docs/moe.md).
        """
        if not self.l2:
            return None
        return math.sqrt(d_model) if self.l2_scale is None else self.l2_scale

    @property
    def noise(self) -> float:
        return self.jitter

    def travels(self, training: bool, packed: bool) -> bool:
        return True

    def router_params(self, d_model: int) -> int:
        return d_model * self.experts * self.slots + self.l2

    @property
    def active_share(self) -> float:
        # the experts' work relative to an FFN on every token depends on the length
        return 1.0

    def computed(self, row: RowShape, training: bool) -> float:
        return self.experts * self.slots / row.antibody

    def multiply_adds(self, d_model: int, expert: float, row: RowShape, training: bool) -> float:
        # router, tokens to slots, slots to tokens; in a packed row once for each antibody
        weights = 3 * d_model * self.experts * self.slots * row.antibodies
        return weights + self.computed(row, training) * expert


FAMILIES: dict[str, type[Router]] = {
    family.name: family for family in (TopK, TopP, ExpertChoice, Soft, Sequence)
}
