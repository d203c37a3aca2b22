"""Whether an assay has enough antibodies, groups and classes to train a head on and to test it."""

from collections.abc import Sequence

import numpy as np

from moe_ablm.errors import UserError, counted
from moe_ablm.evaluation.cohort import Annotated
from moe_ablm.evaluation.formats.assays import Assay
from moe_ablm.evaluation.supervised.folds import cdr3_of

FEWEST = 10  # antibodies to train on
FEWEST_TESTED = 3
MOST_FOLDS = 1000


def classes_of(assay: Assay) -> np.ndarray:
    """What folds should have equally many of: classes of antibodies; else one, int64 `[n]`."""
    whole = assay.classes and not assay.of_residues
    return assay.targets if whole else np.zeros(len(assay.targets), np.int64)


def strata(assay: Assay) -> np.ndarray:
    """Classes that folds should have equally many of; of values quarters, int64 `[n]`."""
    if assay.classes:
        return classes_of(assay)
    cuts = np.quantile(assay.targets, [0.25, 0.5, 0.75])
    return np.searchsorted(cuts, assay.targets, side="right")


def require_targets(assay: Assay) -> None:
    """UserError unless there are two different targets or more, and antibodies to train on."""
    distinct = len(assay.classes) if assay.of_residues else len(np.unique(assay.targets))
    if distinct < 2:
        only = assay.classes[0] if assay.classes else f"{assay.targets[0]:g}"
        what = "labelled residues of all " if assay.of_residues else "all "
        raise UserError(
            f"--target: {what}{len(assay.targets):,} antibodies have the one value {only!r}: "
            "expected two different ones or more, to be told apart"
        )
    if len(assay.targets) < FEWEST:
        raise UserError(
            f"--input: {len(assay.targets):,} antibodies with a target, expected at least {FEWEST}"
        )


def require_groups(assay: Assay, groups: np.ndarray, count: int, called: str) -> None:
    """Refuses an assay of which a class has fewer groups than there are folds.

    Args:
      assay: antibodies and targets.
      groups: number of the group of each antibody, int64 `[n]`.
      count: folds.
      called: what groups are, as `--groups` says it.

    Raises:
      UserError: there are fewer.
    """
    what = f"groups (--groups {called})"
    classes = classes_of(assay)
    for index in np.unique(classes).tolist():
        members = groups[classes == index]
        distinct = len(np.unique(members))
        if distinct < count:
            of = f"class {assay.classes[index]!r}: " if len(np.unique(classes)) > 1 else ""
            raise UserError(
                f"{of}{len(members):,} antibodies are of {distinct} {what}, expected at least "
                f"{count}, one a fold: set --folds, or --groups sequence (or a column), "
                "which tells how well other variants of the same clones are predicted"
            )


def without_clone(antibodies: Sequence[Annotated]) -> list[str]:
    """A line that counts those of which no relatives are known, if there are any."""
    lost = sum(not (a.heavy.v_gene and cdr3_of(a.heavy)) for a in antibodies)
    if not lost:
        return []
    return [
        f"{lost:,} of {counted(len(antibodies), 'antibody', 'antibodies')} have no heavy V gene or "
        "CDRH3 by annotation: only those of equal sequences are kept in one fold, relatives may be "
        "in two (--groups COLUMN names groups of your own)"
    ]


def require_given_folds(assay: Assay) -> None:
    """UserError unless without any fold there is enough to train on, of every class."""
    folds, classes = np.array(assay.folds), classes_of(assay)
    names = np.unique(folds).tolist()
    if not 2 <= len(names) <= MOST_FOLDS:
        raise UserError(f"--fold: {len(names):,} different folds, expected 2 to {MOST_FOLDS:,}")
    for name in names:
        left = classes[folds != name]
        if len(left) < FEWEST:
            raise UserError(
                f"--fold: {len(left)} antibodies are in other folds than {name}, expected at least "
                f"{FEWEST} to train on"
            )
        if missing := set(np.unique(classes).tolist()) - set(np.unique(left).tolist()):
            raise UserError(
                f"--fold: all antibodies of class {assay.classes[min(missing)]!r} are in fold "
                f"{name}, expected some in another, to be trained on"
            )


def require_parts(assay: Assay) -> None:
    """UserError unless the parts are enough to train on, of every class, and to test."""
    parts = np.array(assay.parts)
    for part, fewest in (("train", FEWEST), ("test", FEWEST_TESTED)):
        found = int((parts == part).sum())
        if found < fewest:
            raise UserError(f"--split: {found} rows are {part}, expected at least {fewest}")
    if assay.of_residues:
        return
    trained = assay.targets[parts == "train"]
    if len(np.unique(trained)) < 2:
        raise UserError("--split: all antibodies of the part train have one target, expected two")
    if assay.classes:
        missing = set(np.unique(assay.targets)) - set(np.unique(trained))
        if missing:
            name = assay.classes[int(min(missing))]
            raise UserError(f"--split: no antibody of class {name!r} is in the part train")
