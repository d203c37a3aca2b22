"""Models of transformers, asked as ours are: rows of our tokens in, arrays over them out.

Rows of one length make a batch, so that nothing is padded and a result depends on its row alone.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np

from moe_ablm.errors import ArgumentError
from moe_ablm.inference.buckets import BATCH_TOKENS, Engine, NotOffered, Task
from moe_ablm.inference.embed import HiddenStates
from moe_ablm.inference.logits import EveryPosition, OnePosition
from moe_ablm.interop.pretrained import Pretrained
from moe_ablm.interop.saved import Model

PRECISIONS = ("float32", "bfloat16")


class TorchEngine(Engine):
    """An engine for a model that torch computes.

    It answers `EveryPosition`, `OnePosition` and `HiddenStates`; log-probabilities are those of its
    own vocabulary, at the places of our tokens, -inf of those that it has not.
    """

    model: Pretrained

    def __init__(  # not that of an encoder of ours: there is nothing to compile
        self,
        model: Pretrained,
        precision: str = "float32",
        devices: int = 1,
        batch_tokens: int | None = None,
    ):
        """Prepares a model; arguments and errors are those of `Engine`."""
        import torch

        if precision not in PRECISIONS:
            expected = f"of a model of transformers, expected one of {', '.join(PRECISIONS)}"
            raise ArgumentError("precision", precision, expected)
        if devices != 1:
            raise ArgumentError("devices", devices, "expected 1 for a model of transformers")
        if batch_tokens is not None and batch_tokens < 1:
            raise ArgumentError("batch_tokens", batch_tokens, "expected at least 1")
        self.model, self.precision = model, precision
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._tokens = batch_tokens or BATCH_TOKENS.get(self._device, 65_536)
        self._network = model.network.to(self._device, getattr(torch, precision))

    def __repr__(self) -> str:
        count = self.model.params_counts()[0]
        kind = type(self).__name__
        return f"{kind}({self.model.source}: {count:,} parameters, {self.precision})"

    def parameters(self) -> NoReturn:
        """Raises: parameters of another kind of encoder."""
        raise NotOffered(
            f"{self.model.source}: its encoder is neither trained nor initialised here; expected a "
            "run, or weights that python -m moe_ablm import converts"
        )

    def with_model(self, model: Model) -> NoReturn:
        """Raises, as `parameters`."""
        self.parameters()

    def run(
        self, task: Task, rows: Sequence[np.ndarray], at: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Computes `task` for each row; as `Engine.run`, but nothing is padded.

        Raises:
          NotOffered: the task needs an encoder of ours.
        """
        if not isinstance(task, EveryPosition | OnePosition | HiddenStates):
            raise NotOffered(
                f"{self.model.source}: {type(task).__name__} is of encoders of moe_ablm alone; "
                "expected logits or hidden states to be asked for"
            )
        lengths = np.array([len(row) for row in rows], np.int64)
        for length in np.unique(lengths).tolist():
            members = np.flatnonzero(lengths == length)
            size = max(self._tokens // length, 1)
            for first in range(0, len(members), size):
                part = members[first : first + size].tolist()
                place = None if at is None else np.array([at[i] for i in part])
                found = self._computed(task, np.stack([rows[i] for i in part]), place)
                yield from zip(part, found, strict=True)

    def _computed(self, task: Task, tokens: np.ndarray, at: np.ndarray | None) -> np.ndarray:
        import torch

        ids = torch.from_numpy(self.model.ids[tokens]).to(self._device)
        hidden = isinstance(task, HiddenStates)
        with torch.inference_mode():
            output = self._network(ids, torch.ones_like(ids), output_hidden_states=hidden)
            if isinstance(task, HiddenStates):
                return output.hidden_states[task.layer].float().cpu().numpy()
            logits = output.logits if at is None else output.logits[range(len(at)), at]
            log_probabilities = logits.float().log_softmax(-1).cpu().numpy()
        known = self.model.known
        found = np.full((*log_probabilities.shape[:-1], len(known)), -np.inf, np.float32)
        found[..., known] = log_probabilities[..., self.model.ids[known]]
        return found
