"""Values with which nothing sensible can be drawn."""

import math

import numpy as np
import pytest

from moe_ablm import api
from moe_ablm.errors import UserError
from moe_ablm.inference.sampling import Sampling


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (0, -1.0, math.nan, math.inf, "1", None)),
        ("samples", (-1, 1.5, True, None)),
        ("seed", (-1, 0.5, 1 << 63)),
        ("top", (0, 21, 2.0)),
    ],
)
def test_each_is_refused_in_the_words_of_python(name, values):
    for value in values:
        with pytest.raises(UserError) as error:  # before the model is looked at
            api.infill(None, [("EV_", "")], **{name: value})
        assert str(error.value).startswith(f"{name}={value!r}: expected ")


def test_integers_of_numpy_are_integers():
    assert Sampling(np.int64(3), 0.5, np.uint8(1), np.int32(20)).samples == 3
