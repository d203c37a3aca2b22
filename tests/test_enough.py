"""What is too little to train a head on, or to test it, by assays that are written out."""

from dataclasses import replace

import numpy as np
import pytest

from moe_ablm.data.antibody import Antibody
from moe_ablm.errors import UserError
from moe_ablm.evaluation.formats.assays import Assay
from moe_ablm.evaluation.supervised.enough import (
    require_given_folds,
    require_groups,
    require_parts,
    require_targets,
    strata,
)

ANTIBODIES = tuple(Antibody(str(i), "EVQ", "DIQ") for i in range(20))
VALUES = Assay("regression", ANTIBODIES, np.arange(20.0))
BINDS = Assay("classification", ANTIBODIES, np.array([0, 1] * 10), ("no", "yes"))
PARTS = ("train",) * 14 + ("valid",) * 2 + ("test",) * 4
FOLDS = ("a",) * 10 + ("b",) * 10


@pytest.mark.parametrize(
    ("check", "assay", "words"),
    [
        (require_targets, replace(VALUES, targets=np.full(20, 2.5)), "the one value '2.5'"),
        (require_targets, replace(BINDS, classes=("no",), targets=np.zeros(20, int)), "value 'no'"),
        (require_targets, replace(VALUES, targets=np.arange(9.0)), "9 antibodies with a target"),
        (require_parts, replace(VALUES, parts=("train",) * 9 + ("test",) * 11), "9 rows are train"),
        (require_parts, replace(VALUES, parts=("train",) * 18 + ("test",) * 2), "2 rows are test"),
        (
            require_parts,
            replace(
                BINDS, parts=PARTS, targets=np.array([0, 1] * 7 + [2] * 6), classes=("x", "y", "z")
            ),
            "no antibody of class 'z'",
        ),
        (require_given_folds, replace(VALUES, folds=("a",) * 20), "1 different folds"),
        (require_given_folds, replace(VALUES, folds=("a",) * 11 + ("b",) * 9), "9 antibodies are"),
        (
            require_given_folds,
            replace(BINDS, folds=FOLDS, targets=np.array([0] * 5 + [1] * 5 + [0] * 10)),
            "all antibodies of class 'yes' are in fold a",
        ),
    ],
)
def test_too_little_is_refused(check, assay, words):
    with pytest.raises(UserError, match=words):
        check(assay)


def test_enough_is_not_refused():
    for assay in (VALUES, BINDS):
        require_targets(assay)
        require_parts(replace(assay, parts=PARTS))
        require_given_folds(replace(assay, folds=FOLDS))


def test_every_class_has_a_group_for_each_fold():
    groups = np.array([0, 1, 0, 2, 0, 3, 0, 4, 0, 5] * 2)  # all of "no" are of one
    with pytest.raises(UserError, match="class 'no': 10 antibodies are of 1 groups"):
        require_groups(BINDS, groups, 2, "clone")
    require_groups(VALUES, groups, 6, "clone")
    with pytest.raises(UserError, match="^20 antibodies are of 6 groups"):
        require_groups(VALUES, groups, 7, "clone")


def test_strata_of_values_are_quarters():
    assert np.bincount(strata(VALUES)).tolist() == [5, 5, 5, 5]
    assert strata(BINDS).tolist() == [0, 1] * 10
