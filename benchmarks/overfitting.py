r"""Whether experts over-fit in fine-tuning, and what holds them back, on a few rows of two assays.

    python benchmarks/overfitting.py --runs runs/compare_routers --data gb1=splits/sampled.csv \
        --data specificity=specificity.csv.gz --out overfitting.csv

Encoders are those of `sweeps/compare_routers.py`, of equal active parameters, each seed's with a
draw of rows of that seed. Half of the rows are trained on, half are held out, clones on one side.
A line a run and pass is added to `--out`; what is there is not run again. The tables, last: means
over seeds with Student's 95 % intervals, and differences from what each is compared with, seed by
seed: routers with the dense encoder, remedies with the same router without one.
"""

import csv
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from moe_ablm.data.antibody import Antibody
from moe_ablm.endings import Parser, end
from moe_ablm.errors import UserError
from moe_ablm.evaluation.formats.protein_choice import without_common_ends
from moe_ablm.evaluation.formats.protein_files import read_tasks
from moe_ablm.evaluation.kinds import over_seeds
from moe_ablm.evaluation.supervised.folds import clonal_folds, clones, drawn, read_labelled
from moe_ablm.evaluation.supervised.head_inputs import Head
from moe_ablm.evaluation.supervised.heads import Training, fit
from moe_ablm.inference.buckets import Engine
from moe_ablm.interop.load import load_model
from sweeps.planned import read_plan

RATE = 5e-4  # of the encoder: five times that of `finetune`, as there are few updates
WHOLE = {"full": True, "encoder_lr": RATE}
REMEDIES: Mapping[str, Mapping] = {
    "whole": WHOLE,
    "frozen routers": WHOLE | {"freeze_routers": True},
    "expert dropout": WHOLE | {"expert_dropout": 0.4},  # as Fedus et al. 2022
    "lora": {"rank": 8, "encoder_lr": 10 * RATE},
}
# router, remedy
VARIANTS = (
    ("dense", "whole"),
    ("top2", "whole"),
    ("top2", "frozen routers"),
    ("top2", "expert dropout"),
    ("top2", "lora"),
    ("expert-choice", "whole"),
    ("soft", "whole"),
)
DOMAIN = 56  # residues of GB1 without its partner
KEY = ("data", "router", "remedy", "seed", "rows", "passes")  # of a run
COLUMNS = (*KEY, "pass", "train", "held_out", "score", "cpu_seconds")
HEAD = ("router", "trained", "seeds", "training loss", "held-out loss", "gap", "gap, difference",
        "held-out score", "score, difference")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Drawn:
    """Rows of a data set: `held` is True of those that are held out."""

    head: Head
    antibodies: Sequence[Antibody]
    targets: np.ndarray
    held: np.ndarray


def specificity(path: Path) -> Callable[[int, int], Drawn]:
    """Equally many heavy chains of each label, by what they bind."""
    everyone = read_labelled([path])[0]
    labels = sorted({a.label for a in everyone})

    def draw(rows: int, seed: int) -> Drawn:
        size = rows // len(labels)
        parts = [drawn([a for a in everyone if a.label == x], size, seed) for x in labels]
        found = [a for part in parts for a in part]
        classes = np.array([labels.index(a.label) for a in found])
        held = clonal_folds(clones(found), classes, 2, np.random.default_rng(seed)) == 1
        heavy = [replace(a.antibody, light="") for a in found]
        return Drawn(Head("classification", len(labels)), heavy, classes, held)

    return draw


def gb1(path: Path) -> Callable[[int, int], Drawn]:
    """Variants of GB1 with their fitness, all of one clone: divided at random."""
    (task,) = read_tasks([path])
    (split,), _ = without_common_ends(task.splits, DOMAIN)
    everyone = sorted(split.everyone(), key=lambda p: p.sequence)

    def draw(rows: int, seed: int) -> Drawn:
        order = np.random.default_rng(seed).permutation(len(everyone))[:rows]
        found = [everyone[i] for i in order]
        targets = np.array([float(p.target) for p in found])
        return Drawn(
            Head("regression", 1), [p.antibody for p in found], targets, np.arange(rows) % 2 == 1
        )

    return draw


READERS = {"specificity": specificity, "gb1": gb1}


def trained(engine: Engine, rows: Drawn, training: Training) -> tuple[dict, float]:
    """Losses after each pass, and the held-out score at the end: accuracy, or Spearman's."""

    def part(held: bool) -> tuple[list[Antibody], np.ndarray]:
        members = np.flatnonzero(rows.held == held)
        return [rows.antibodies[i] for i in members], rows.targets[members]

    watched = {"train": part(False), "held_out": part(True)}
    predictor = fit(engine, *watched["train"], rows.head, training, watched=watched)
    asked, truth = watched["held_out"]
    found = predictor(asked)
    if rows.head.kind == "classification":
        return dict(predictor.losses), float((found.argmax(1) == truth).mean())
    return dict(predictor.losses), float(stats.spearmanr(found, truth)[0])


def lines_of(path: Path) -> list[dict]:
    """What was measured before."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def measure(options, draws: Mapping[str, Callable]) -> None:
    """Runs what is not in the file yet, data set after data set."""
    done = {tuple(line[c] for c in KEY) for line in lines_of(options.out)}
    _, planned = read_plan(options.runs)
    cells = {(p.axes["router"], int(p.axes["seed"])): p.cell.workdir for p in planned}
    for name, draw in draws.items():
        rows = [draw(options.rows, seed) for seed in range(options.seeds)]
        for router, remedy in VARIANTS:  # one by one: what was compiled for a seed serves all
            for seed in range(options.seeds):
                run = name, router, remedy, str(seed), str(options.rows), str(options.passes)
                if run in done:
                    continue
                if (router, seed) not in cells:
                    raise UserError(f"--runs {options.runs}: no encoder {router} of seed {seed}")
                how = Training(epochs=options.passes, batch=16, seed=seed, **REMEDIES[remedy])
                start = time.process_time()
                engine = Engine(load_model(cells[router, seed]))
                losses, score = trained(engine, rows[seed], how)
                seconds = round(time.process_time() - start, 1)
                append(options.out, run, losses, score, seconds)
                print(*run, f"{score:.3f}", f"{seconds} s", flush=True)


def append(path: Path, run: tuple, losses: Mapping, score: float, seconds: float) -> None:
    """Adds the lines of a run, all at once."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        lines = [COLUMNS] if new else []
        pairs = zip(losses["train"], losses["held_out"], strict=True)
        for i, (train, held) in enumerate(pairs, start=1):
            last = (score, seconds) if i == len(losses["train"]) else ("", "")
            lines.append((*run, i, f"{train:.5f}", f"{held:.5f}", *last))
        writer.writerows(lines)


def summary(lines: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Rows of the table of a data set under `HEAD`: after the last pass, means over seeds.

    Args:
      lines: of the file, of one data set with equal rows and passes.
    """
    runs: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for line in lines:
        if line["score"]:  # the last pass
            train, held, score = (float(line[c]) for c in ("train", "held_out", "score"))
            by_seed = runs.setdefault((line["router"], line["remedy"]), {})
            by_seed[line["seed"]] = np.array([train, held, held - train, score])
    found = []
    for (router, remedy), by_seed in runs.items():
        reference = ("dense" if remedy == "whole" else router), "whole"
        other = runs.get(reference, {}) if reference != (router, remedy) else {}
        values = [interval(each) for each in np.transpose(list(by_seed.values()))]
        paired = [by_seed[seed] - other[seed] for seed in by_seed if seed in other]
        less = [interval(each) for each in np.transpose(paired)] if paired else [""] * 4
        row = [router, remedy, str(len(by_seed)), *values[:3], less[2], values[3], less[3]]
        found.append(row)
    return found


def interval(values: Sequence[float]) -> str:
    """Mean and Student's 95 % interval."""
    mean, low, high = over_seeds(values, [0.0])
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = Parser(prog="python benchmarks/overfitting.py", description=__doc__)
    add = parser.add_argument
    add("--runs", type=Path, required=True, help="--out of sweeps/compare_routers.py")
    add("--data", action="append", required=True, metavar="NAME=FILE", help=", ".join(READERS))
    add("--out", type=Path, required=True, metavar="FILE.csv", help="a line a run and pass")
    add("--rows", type=int, default=252, help="of a draw; half are trained on (default 252)")
    add("--passes", type=int, default=8, help="over the training set (default 8)")
    add("--seeds", type=int, default=3, help="default 3")
    options = parser.parse_args(argv)

    def carry_out() -> None:
        named = dict(text.partition("=")[::2] for text in options.data)
        if unknown := set(named) - set(READERS):
            raise UserError(f"--data {min(unknown)}: expected {' or '.join(READERS)}, =FILE")
        measure(options, {name: READERS[name](Path(file)) for name, file in named.items()})
        for name in named:
            asked = name, str(options.rows), str(options.passes)
            lines = lines_of(options.out)
            same = [x for x in lines if (x["data"], x["rows"], x["passes"]) == asked]
            print(f"\n{name}\n\n| {' | '.join(HEAD)} |\n|---|---|{'--:|' * (len(HEAD) - 2)}")
            for row in summary(same):
                print(f"| {' | '.join(row)} |")

    return end(carry_out, "benchmarks")


if __name__ == "__main__":
    sys.exit(main())
