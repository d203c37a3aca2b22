"""The rows of a dataset that a run sees, and their batches for training and validation."""

from collections.abc import Iterator

import jax

from moe_ablm.config import Config
from moe_ablm.data import pipeline
from moe_ablm.data.dataset import Dataset

EVALUATION_SEED = 20_240_601  # of the validation masks: the same for every run, whatever its seed
EVALUATION_MASK_RATE = 0.15


class Feed:
    """Training and validation batches of one run.

    Attributes:
      train_rows, valid_rows: row numbers in the dataset.
      left_out: antibodies of the training fraction that are longer than `data.length`.
      unique_tokens: tokens of all training rows, special tokens included.
    """

    def __init__(self, config: Config, dataset: Dataset):
        d = config.data
        self.dataset, self._config = dataset, config
        self._spec = pipeline.BatchSpec(
            config.train.batch, d.length, d.layout, d.mask_rate, config.seed
        )
        self.train_rows = pipeline.fitting_rows(dataset, "train", d.fraction, self._spec)
        valid_rows = pipeline.fitting_rows(dataset, "valid", "full", self._spec)
        self.valid_rows = pipeline.evaluation_rows(dataset, valid_rows, config.eval.pairs)
        self.left_out = len(dataset.rows("train", d.fraction)) - len(self.train_rows)
        self.unique_tokens = int(pipeline.row_tokens(dataset, self.train_rows, d.layout).sum())

    def train_batches(self, first_step: int) -> Iterator[pipeline.Batch]:
        """This process's rows of the batches of `first_step` and later."""
        process = (jax.process_index(), jax.process_count())
        source = pipeline.TrainBatches(
            self.dataset, self.train_rows, self._spec, self._config.train.steps, process
        )
        return pipeline.train_iterator(source, first_step, self._config.compute.loader_threads)

    def valid_batches(self) -> Iterator[pipeline.Batch]:
        """This process's rows of the validation batches: the same rows and masks every time."""
        spec = pipeline.BatchSpec(
            self._spec.batch,
            self._spec.length,
            self._spec.layout,
            EVALUATION_MASK_RATE,
            EVALUATION_SEED,
        )
        part = spec.batch // jax.process_count()
        mine = slice(jax.process_index() * part, (jax.process_index() + 1) * part)
        for batch in pipeline.evaluation_batches(self.dataset, self.valid_rows, spec):
            yield {name: array[mine] for name, array in batch.items()}
