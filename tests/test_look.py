"""What the page of `moe-ablm app` shows of an antibody, against the verbs."""

import numpy as np
import pytest
from tiny_models import HEAVY, LIGHT, engine

from moe_ablm.data.tokenizer import LAYOUTS
from moe_ablm.errors import UserError
from moe_ablm.inference import route, scan, score
from moe_ablm.inference.antibodies import given
from moe_ablm.inference.look import completions, look


def antibody(pair):
    return given([pair], LAYOUTS["esm"], 320)[0]


@pytest.mark.parametrize("one_pass", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_is_shown_is_what_the_verbs_say(one_pass):
    model, shown = engine("expert_choice"), antibody(("EVQLVESX", "DIQM"))
    seen = look(model, shown, "imgt", one_pass)
    (scores,) = score.score(model, [shown], one_pass)
    (odds,) = scan.scan(model, [shown], "wild-type-marginal" if one_pass else "masked-marginal")
    np.testing.assert_array_equal(seen.log_likelihoods, scores)
    np.testing.assert_array_equal(seen.log_odds, odds)
    assert "".join(seen.labels["residue"]) == "EVQLVESXDIQM"
    # the first line of a residue and layer is the expert of the largest gate, -1 where none is
    best: dict[tuple[int, int], int] = {}
    for line in route.table(model, [shown]).to_pylist():
        place = line["position"] - 1 + 8 * (line["chain"] == "light")
        best.setdefault((place, line["layer"]), line["expert"])
    assert dict(np.ndenumerate(seen.experts)) == best
    assert -1 in best.values()


def test_redesigns_are_refused_in_one_line():
    whole = antibody((HEAVY, LIGHT))
    for where, words in (("", "name regions"), ("CDRH9", "CDRH9"), ("H500", "nothing chosen")):
        with pytest.raises(UserError, match=words):
            completions(engine("expert_choice"), whole, where, "imgt", 0)
