"""The stability watch: whether the routing and the loss of a run are stable or collapse.

It reads the statistics of every update (jax is not needed), keeps a small JSON state and gives a
verdict:

    stable              nothing was flagged
    too short to tell   nothing was flagged, in fewer updates than a flag needs
    transient collapse  something was flagged and recovered
    collapse            something is flagged at the end

The signals depend on the router. Token choice: load entropy, max/min load, dead experts, dropped
share. Soft-MoE: load entropy, max/min load and dead experts by the experts' shares of the output,
and a dispatch that is flat or sharp. Expert choice is balanced by construction. It collapses when
its experts all choose the same tokens (no expert takes the others) or weigh all tokens alike. All
routers: RMS of the logits. Every run, dense ones included: loss spikes.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moe_ablm.model.families import Router

if TYPE_CHECKING:
    from moe_ablm.model.routing import RouterStats

STABLE, TRANSIENT, COLLAPSE = "stable", "transient collapse", "collapse"
TOO_SHORT = "too short to tell"
READ = ("load", "entropy", "dropped", "spread", "logit_rms")  # of `RouterStats`, averaged


@dataclass(frozen=True)
class Thresholds:
    """When a signal is flagged, and the reason for each number.

    Attributes:
      window: updates over which statistics are averaged (exponentially). One batch of a
        sequence-level router has few decisions: 8 antibodies cannot load 64 experts evenly.
      hold: bad updates in a row before a signal is flagged, and good ones before it recovers.
      narrow: load entropy is flagged below this fraction of the way, in logarithms, from total
        collapse (K experts take all) to balance (E do): at 1/2, fewer than sqrt(K E) experts.
      imbalance: largest max/min load of the experts that are not dead.
      dead_load: an expert is dead below this fraction of its fair share 1/E: a tenth of the work
        means a tenth of the gradient.
      dead_share: fraction of the experts (at least one expert) that must be dead: an eighth of the
        parameters is then wasted, which is more than noise in the loss hides.
      dead_hold: updates for which they must be dead: a rarely chosen expert may idle for a while.
      kept: token choice with a capacity: smallest fraction of the assignments with room that must
        be kept.
      unseen: expert choice: tokens without an expert are flagged at this fraction of the way from
        experts that choose independently, `(1-c)^E`, to experts that all choose the same, `1-c`,
        where c is the share of the tokens that an expert takes. At K 2, E 8 this is 32 %. Trained
        routers leave 0 to 1 %, fresh ones 4 to 17 %, runs at 100 times the learning rate 30 to
        48 %.
      flat: spread above which every slot (or expert) sees the plain mean of all tokens: weights
        `1 + s z` have spread `1 - s^2 / (2 ln n)`, so 0.999 is s = 10 % at n = 240 tokens.
      formed: spread below which a dispatch has formed. Initial routers are nearly flat (0.985 to
        0.9999), which is neither a collapse nor a reason to stop a run.
      sharp: spread below which a slot reads one token: exp(0.01 ln 240) = 1.06 tokens.
      logit_rms: a float32 softmax resolves ln 2^24 = 16.6; beyond that, losing experts have no
        gradient.
      spike: deviation of a loss above the median of the last `losses`, in units of 1.4826 MAD.
      spike_floor: smallest unit of deviation, as a fraction of the median, so that a smooth loss
        raises no alarm.
      spike_hold: updates in a row: a single odd batch is not a spike.
      losses: number of earlier losses, without those of spikes, to compare a loss with.
      stop_after: updates that a collapse must last before a run is stopped; transient ones recover
        sooner.
    """

    window: int = 20
    hold: int = 10
    narrow: float = 0.5
    imbalance: float = 50.0
    dead_load: float = 0.1
    dead_share: float = 1 / 8
    dead_hold: int = 100
    kept: float = 0.5
    unseen: float = 1 / 3
    flat: float = 0.999
    formed: float = 0.99
    sharp: float = 0.01
    logit_rms: float = 17.0
    spike: float = 6.0
    spike_floor: float = 0.01
    spike_hold: int = 3
    losses: int = 50
    stop_after: int = 200


DEFAULTS = Thresholds()
FEWEST_LOSSES = 8  # to compare a loss with
MOST_EVENTS = 16  # that a verdict lists


class Signal(NamedTuple):
    """A quantity, the limit beyond which it is bad, and the updates for which it must be bad."""

    name: str
    limit: float
    above: bool  # whether values above the limit are bad, or those below
    hold: int


def dead_experts(load: np.ndarray, fraction: float = DEFAULTS.dead_load) -> np.ndarray:
    """How many experts of `load [..., E]` get less than `fraction` of a fair share."""
    return (load < fraction / load.shape[-1]).sum(-1)


def max_min_load(load: np.ndarray, fraction: float = DEFAULTS.dead_load) -> np.ndarray:
    """Largest over smallest load of `[..., E]`, among the experts that are not dead."""
    alive = np.where(load < fraction / load.shape[-1], np.inf, load)
    return load.max(-1) / alive.min(-1)


def load_entropy(load: np.ndarray) -> np.ndarray:
    """Entropy of `load [..., E]` over log E: 1 is balanced."""
    terms = np.where(load > 0, load * np.log(np.where(load > 0, load, 1.0)), 0.0)
    return -terms.sum(-1) / math.log(max(load.shape[-1], 2))


def signals_of(moe: Router | None, thresholds: Thresholds = DEFAULTS) -> tuple[Signal, ...]:
    """The signals of each MoE layer; none for a dense encoder."""
    if moe is None:
        return ()
    t, experts, fewest = thresholds, moe.experts, moe.fewest_loaded
    signals = [Signal("logit_rms", t.logit_rms, True, t.hold)]
    if fewest is not None and fewest < experts:  # if every token has all experts, loads say nothing
        from_one = math.log(fewest) / math.log(experts)
        signals += [
            Signal("load_entropy", from_one + t.narrow * (1 - from_one), False, t.hold),
            Signal("max_min_load", t.imbalance, True, t.hold),
            Signal("dead_experts", math.ceil(experts * t.dead_share) - 1, True, t.dead_hold),
        ]
    dropped = moe.most_dropped(t.kept, t.unseen)
    if dropped is not None:
        signals.append(Signal("dropped", dropped, True, t.hold))
    if moe.weighs_tokens:
        signals += [
            Signal("flat_dispatch", t.flat, True, t.hold),
            Signal("sharp_dispatch", t.sharp, False, t.hold),
        ]
    return tuple(signals)


class StabilityWatch:
    """Judges the updates of a run one by one; `state` and `restore` carry it over a restart.

    Args:
      moe: spec of the routers; None: dense.
      layers: numbers of the MoE layers, M of them.
      warmup: updates of the learning rate's warm-up. Routing is judged after it (and after one
        window), since fresh routers send most tokens to few experts and spread them out during it.
      thresholds: when signals are flagged.
    """

    def __init__(
        self,
        moe: Router | None,
        layers: tuple[int, ...],
        warmup: int = 0,
        thresholds: Thresholds = DEFAULTS,
    ):
        self.thresholds = thresholds
        self._signals = signals_of(moe, thresholds) if layers else ()
        # A small batch of antibodies uses few experts even when healthy, so judge the running mean.
        # For other routers a mean could hide that every batch goes to one expert, each to another.
        self._whole = bool(moe and moe.per_antibody)
        self._from = max(warmup, thresholds.window)  # routing is judged after so many updates
        # one place for each signal of each layer, the loss last
        loss = Signal("loss_spike", thresholds.spike, True, thresholds.spike_hold)
        self._places = [(s, layer) for s in self._signals for layer in layers] + [(loss, None)]
        self._limit = np.array([s.limit for s, _ in self._places])
        self._sign = np.array([1.0 if s.above else -1.0 for s, _ in self._places])
        self._hold = np.array([s.hold for s, _ in self._places])
        self._clear = np.maximum(self._hold // thresholds.hold, 1)  # a good update subtracts this
        self._flat = np.array([s.name == "flat_dispatch" for s, _ in self._places])
        n = len(self._places)
        self._mean: dict[str, np.ndarray] = {}
        self._losses: list[float] = []
        self._updates = 0
        self._count = np.zeros(n, np.int64)  # bad updates less good ones, 0 to `hold`
        self._open = np.zeros(n, bool)
        self._since = np.zeros(n, np.int64)  # step at which the open episode began
        self._formed = ~self._flat
        self._counts = np.zeros(n, bool)  # whether the open episode is one of a formed dispatch
        self._worst = np.full(n, -np.inf)  # signed: larger is worse
        self._worst_step = np.zeros(n, np.int64)
        self._events: list[dict[str, Any]] = []
        self._recovered = 0

    def update(self, step: int, loss: float, stats: "RouterStats | None" = None) -> None:
        """Judges an update.

        Args:
          step: number of the update, from 1.
          loss: training loss (nats), finite.
          stats: numpy arrays `[M, ...]`; None for a dense encoder.
        """
        self._updates += 1
        judged = np.zeros(len(self._places), bool)
        values = np.zeros(len(self._places))
        if self._signals and stats is not None:
            self._average(stats)
            if self._updates > self._from:
                values[:-1] = self._values()
                judged[:-1] = True
        values[-1], judged[-1] = self._deviations(loss), len(self._losses) >= FEWEST_LOSSES
        excess = self._sign * (values - self._limit)
        bad = judged & ~(excess <= 0)  # NaN is bad as well
        if not bad[-1]:
            self._losses = [*self._losses, float(loss)][-self.thresholds.losses :]
        spread_out = self._flat & judged & (values < self.thresholds.formed)
        self._formed |= spread_out
        worse = judged & (excess > self._worst)
        self._worst[worse], self._worst_step[worse] = excess[worse], step
        self._follow(step, bad, values)

    def _average(self, stats: "RouterStats") -> None:
        weight = 1 / min(self._updates, self.thresholds.window)
        for name in READ:
            new = np.asarray(getattr(stats, name), np.float64)
            old = self._mean.get(name, 0.0)
            self._mean[name] = old + weight * (new - old)

    def _values(self) -> np.ndarray:
        """Averaged value of every signal of every layer, in the order of the places."""
        mean, t = self._mean, self.thresholds
        found = {
            "logit_rms": lambda: mean["logit_rms"],
            "load_entropy": lambda: load_entropy(mean["load"]) if self._whole else mean["entropy"],
            "max_min_load": lambda: max_min_load(mean["load"], t.dead_load),
            "dead_experts": lambda: dead_experts(mean["load"], t.dead_load),
            "dropped": lambda: mean["dropped"],
            "flat_dispatch": lambda: mean["spread"],
            "sharp_dispatch": lambda: mean["spread"],
        }
        return np.concatenate([found[s.name]() for s in self._signals])

    def _deviations(self, loss: float) -> float:
        if len(self._losses) < FEWEST_LOSSES:
            return 0.0
        median = float(np.median(self._losses))
        mad = 1.4826 * float(np.median(np.abs(np.array(self._losses) - median)))
        return (loss - median) / max(mad, self.thresholds.spike_floor * abs(median), 1e-9)

    def _follow(self, step: int, bad: np.ndarray, values: np.ndarray) -> None:
        """Opens and closes episodes."""
        count = self._count + np.where(bad, 1, -self._clear)
        self._count = np.clip(count, 0, self._hold)
        opened = ~self._open & (self._count == self._hold)
        closed = self._open & (self._count == 0)
        for i in np.flatnonzero(closed):
            self._recovered += int(self._counts[i])
            for event in self._events:
                if event["until"] is None and event["place"] == int(i):
                    event["until"] = step
        for i in np.flatnonzero(opened):
            signal, layer = self._places[i]
            self._since[i], self._counts[i] = step - signal.hold + 1, self._formed[i]
            if len(self._events) < MOST_EVENTS:
                event = {"layer": layer, "step": int(self._since[i]), "until": None}
                what = signal.name if self._formed[i] else "unformed_dispatch"
                event |= {"what": what, "value": float(values[i]), "place": int(i)}
                self._events.append(event)
        self._open = (self._open | opened) & ~closed

    @property
    def verdict(self) -> str:
        """`stable`, `too short to tell`, `transient collapse` or `collapse`."""
        if self._open.any():
            return COLLAPSE
        if self._recovered:
            return TRANSIENT
        return STABLE if self._updates >= self._fewest else TOO_SHORT

    @property
    def _fewest(self) -> int:
        """Updates within which a router (but for idle experts) and a loss could be flagged."""
        loss = FEWEST_LOSSES + self.thresholds.spike_hold
        return max(self._from + self.thresholds.hold, loss) if self._signals else loss

    def is_lasting(self, step: int) -> bool:
        """Whether a collapse has lasted `Thresholds.stop_after` updates at `step`."""
        lasting = self._open & self._counts & (step - self._since >= self.thresholds.stop_after)
        return bool(lasting.any())

    def summary(self) -> dict[str, Any]:
        """The verdict, its first events and the worst value of each signal, for `run.json`.

        An event is `{layer, step, until, what, value}`: the layer (None: the loss), the first
        update, the update of recovery (None: not over), the signal, and its value when flagged.
        """
        worst: dict[str, dict] = {}
        for i in np.argsort(-self._worst, kind="stable"):
            signal, layer = self._places[i]
            if np.isfinite(self._worst[i]) and signal.name not in worst:
                value = float(self._sign[i] * self._worst[i] + signal.limit)
                step = int(self._worst_step[i])
                worst[signal.name] = {
                    "value": value, "limit": signal.limit, "layer": layer, "step": step
                }  # fmt: skip
        events = [{k: v for k, v in e.items() if k != "place"} for e in self._events]
        return {"verdict": self.verdict, "events": events, "worst": worst}

    def state(self) -> dict[str, Any]:
        """Everything that must survive a restart, as plain JSON."""
        arrays = {k: getattr(self, f"_{k}").tolist() for k in ARRAYS}
        arrays["worst"] = [None if w == -np.inf else w for w in arrays["worst"]]
        return arrays | {
            "updates": self._updates,
            "recovered": self._recovered,
            "losses": list(self._losses),
            "events": [dict(event) for event in self._events],
            "mean": {name: mean.tolist() for name, mean in self._mean.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a `state`, as if there had been no restart."""
        values = state | {"worst": [-np.inf if w is None else w for w in state["worst"]]}
        for name in ARRAYS:
            now = getattr(self, f"_{name}")
            setattr(self, f"_{name}", np.array(values[name], now.dtype))
        self._updates, self._recovered = state["updates"], state["recovered"]
        self._losses = list(state["losses"])
        self._events = [dict(event) for event in state["events"]]
        self._mean = {name: np.array(mean) for name, mean in state["mean"].items()}


ARRAYS = ("count", "open", "since", "formed", "counts", "worst", "worst_step")
