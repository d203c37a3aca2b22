"""Makes small nested training sets with one validation set, for scaling studies of small models.

    python -m sweeps.nested_data --input data/pairs --out data/nested --pairs 64 512 8192

makes data/nested/64, /512 and /8192. Each has that many training antibodies of the prepared
dataset, smaller sets within larger ones, and all of its validation and test antibodies.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa

from moe_ablm.data.dataset import SPLITS, Dataset, DatasetWriter
from moe_ablm.endings import Parser, end
from moe_ablm.errors import UserError

KEPT = ("licence", "split_rule", "clusters", "cluster_rule", "nearest_train_cdrh3", "sources")


def write_subset(source: Dataset, pairs: int, out: Path) -> None:
    """Writes a dataset of the `pairs` training rows with the smallest fraction keys.

    Raises:
      UserError: the source has fewer, or `out` exists.
    """
    rows = source.rows("train")
    if not 0 < pairs <= len(rows):
        raise UserError(f"--pairs {pairs}: {source.path} has {len(rows)} training antibodies")
    keep = source.split != SPLITS.index("train")
    keep[rows[np.argsort(source.fraction_key[rows], kind="stable")[:pairs]]] = True
    rule = f"the {pairs} training antibodies of {source.identity} with the smallest fraction keys"
    with DatasetWriter(out) as writer:
        start = 0
        for batch in source.batches():
            writer.add(batch.filter(pa.array(keep[start : start + batch.num_rows])))
            start += batch.num_rows
        card = {name: source.card[name] for name in KEPT}
        writer.finish(card | {"fraction_rule": rule, "warnings": []})


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = Parser(
        prog="python -m sweeps.nested_data",
        description=__doc__,
    )
    parser.add_argument("--input", type=Path, required=True, help="prepared dataset")
    parser.add_argument("--out", type=Path, required=True, help="folder for the datasets")
    parser.add_argument(
        "--pairs", type=int, nargs="+", default=[64, 512, 8192], help="sizes; default %(default)s"
    )
    options = parser.parse_args(argv)

    def carry_out() -> None:
        source = Dataset(options.input)
        for pairs in options.pairs:
            write_subset(source, pairs, options.out / str(pairs))
            print(f"{options.out / str(pairs)}: {pairs:,} training antibodies")

    return end(carry_out, "sweeps")


if __name__ == "__main__":
    sys.exit(main())
