"""ft-ESM: ESM-2 fine-tuned on natively paired antibodies, with `<cls><cls>` between the chains.

    python -m moe_ablm import --input esm2_t33_650M_UR50D --out runs/esm2_650m
    python -m moe_ablm prepare --input pairs.parquet --out data/pairs
    python -m moe_ablm.train --config=configs/esm_finetune.py --workdir=runs/ft-esm
    python -m moe_ablm.train --config=configs/esm_finetune.py:size=8m,init=runs/esm2_8m \
        --workdir=runs/ft-esm-8m --config.train.freeze=3

Arguments:
  size: of the ESM-2 in `init`: 8m, 35m, 150m, 650m (default, the published size).
  init: directory that `import` wrote (default runs/esm2_SIZE), or any run of the same encoder.

The settings are from github.com/brineylab/BALM-paper, ESM2_fine-tuning.ipynb (commit 9f23ef3):
1,202,269 pairs, 150,000 updates of 8 x 32 rows padded to 320, peak 4e-4 after 30,000 updates,
linear decay, float16; ten days on eight A100. Here `compute.precision` sets the precision, the run
ends at the fourth evaluation in a row without improvement, and antibodies longer than 320 tokens
are left out instead of cut. On a small dataset use fewer updates (train.steps) and freeze layers
(train.freeze).
"""

from configs.base import get_config as base
from moe_ablm.config import parse_argument

SIZES = ("8m", "35m", "150m", "650m")  # published sizes of ESM-2 that the ladder has


def get_config(arg: str | None = None):
    """Fine-tuning of one size."""
    a = parse_argument(arg, {"size": "650m", "init": ""}, {"size": SIZES})
    c = base()
    c.data.path = "data/pairs"
    c.data.length = 320
    c.model.size = a["size"]
    c.train.init = a["init"] or f"runs/esm2_{a['size']}"
    c.train.steps = 150_000
    c.train.batch = 256
    c.train.warmup = 30_000
    c.train.lr = 4e-4
    c.train.patience = 4  # the published run was stopped when the evaluation loss rose
    c.eval.every = c.checkpoint.every = 5_000
    return c
