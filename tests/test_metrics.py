"""Names and values of what is logged, and the verdict as it is told."""

import json

import numpy as np
import pytest

from moe_ablm.errors import UserError
from moe_ablm.model.routing import RouterStats
from moe_ablm.progress import stability_lines
from moe_ablm.training.metrics import router_metrics
from moe_ablm.verbs.report import _stability, draw_routing

EVENT = {"layer": 3, "what": "load_entropy", "value": 0.3512, "step": 40, "until": None}
SPIKE = {"layer": None, "what": "loss_spike", "value": 7.5, "step": 60, "until": 71}


def test_router_metrics_by_layer():
    load = np.array([[0.25] * 4, [0.7, 0.28, 0.02, 0.0]], np.float32)
    stats = RouterStats(load, load, *(np.arange(2, dtype=np.float32) + i for i in range(8)))
    found = router_metrics(stats, (1, 3))
    assert list(found) == ["1", "3"]
    assert found["3"]["load"] == pytest.approx([0.7, 0.28, 0.02, 0])
    assert (found["1"]["max_min_load"], found["1"]["dead_experts"]) == (1, 0)
    assert found["3"]["max_min_load"] == pytest.approx(2.5)
    assert found["3"]["dead_experts"] == 2
    assert (found["1"]["entropy"], found["3"]["spread"]) == (1, 4)
    json.dumps(found, allow_nan=False)


def test_events_that_are_not_over_come_last():
    lines = stability_lines({"verdict": "collapse", "events": [EVENT, SPIKE], "worst": {}})
    assert lines == [
        "stability: collapse",
        "  loss: loss_spike 7.5 from step 60, over at step 71",
        "  layer 3: load_entropy 0.3512 from step 40, not over",
    ]


def test_report_of_runs_that_go_on_diverged_or_are_damaged(tmp_path):
    file = tmp_path / "run.json"
    assert _stability(file) == ["stability: not known before the run ends"]
    file.write_text(json.dumps({"status": "diverged", "error": "step 5: loss is nan"}))
    assert _stability(file) == ["stability: diverged (step 5: loss is nan)"]
    for content in ("{", "[]", "{}", '{"status": "complete", "stability": null}'):
        file.write_text(content)
        with pytest.raises(UserError, match=r"run\.json is damaged"):
            _stability(file)


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (2, 8), (4, 1024)])
def test_the_routing_figure_of_any_number_of_experts(layers, experts, tmp_path):
    rng = np.random.default_rng(0)
    routed = {str(i): rng.uniform(0, 3, (experts, 16)).tolist() for i in range(layers)}
    routed["0"] = np.zeros((experts, 16)).tolist()  # nothing was routed
    draw_routing(routed, tmp_path / "routing.png")
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")
