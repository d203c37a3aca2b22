"""`benchmarks/overfitting.py`: its intervals are those of scipy, its draws keep clones together."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from benchmarks import overfitting

LOSSES = {  # by router and remedy: training, held-out and score of each seed
    ("dense", "whole"): [(0.5, 0.9, 0.6), (0.4, 1.0, 0.5), (0.6, 0.8, 0.7)],
    ("top2", "whole"): [(0.3, 1.0, 0.6), (0.2, 0.9, 0.7), (0.1, 1.1, 0.5)],
    ("top2", "lora"): [(0.4, 0.8, 0.6), (0.5, 0.9, 0.8), (0.5, 0.7, 0.5)],
}


def write(path, seeds=range(3)):
    for (router, remedy), runs in LOSSES.items():
        for seed in seeds:
            train, held, score = runs[seed]
            run = "gb1", router, remedy, str(seed), "20", "2"
            overfitting.append(path, run, {"train": [2, train], "held_out": [2, held]}, score, 1.0)


def test_means_and_paired_differences_have_students_intervals(tmp_path):
    write(tmp_path / "runs.csv")
    lines = overfitting.lines_of(tmp_path / "runs.csv")
    assert len(lines) == 2 * 9 and [line["pass"] for line in lines[:2]] == ["1", "2"]
    rows = {tuple(row[:2]): row[2:] for row in overfitting.summary(lines)}

    def expected(values) -> str:
        values = np.asarray(values)
        low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
        return f"{values.mean():.2f} [{low:.2f}, {high:.2f}]"

    gaps = {name: [h - t for t, h, _ in runs] for name, runs in LOSSES.items()}
    scores = {name: [s for _, _, s in runs] for name, runs in LOSSES.items()}
    references = {("top2", "whole"): ("dense", "whole"), ("top2", "lora"): ("top2", "whole")}
    for name, row in rows.items():
        seeds, train, held, gap, gap_less, score, score_less = row
        assert seeds == "3" and train == expected([t for t, _, _ in LOSSES[name]])
        assert held == expected([h for _, h, _ in LOSSES[name]])
        assert gap == expected(gaps[name]) and score == expected(scores[name])
        if name in references:
            other = references[name]
            assert gap_less == expected(np.subtract(gaps[name], gaps[other]))
            assert score_less == expected(np.subtract(scores[name], scores[other]))
        else:
            assert gap_less == score_less == ""


def test_what_is_in_the_file_is_not_run_again(tmp_path, monkeypatch):
    out = tmp_path / "runs.csv"
    write(out)
    monkeypatch.setattr(overfitting, "VARIANTS", tuple(LOSSES))
    before = out.read_text()
    (tmp_path / "sweep.json").write_text('{"study": "compare_routers", "cells": []}')
    options = SimpleNamespace(runs=tmp_path, out=out, rows=20, passes=2, seeds=3)
    overfitting.measure(options, {"gb1": lambda rows, seed: None})
    assert out.read_text() == before
    options.rows = 21  # of other runs nothing is there
    with pytest.raises(overfitting.UserError, match="no encoder dense of seed 0"):
        overfitting.measure(options, {"gb1": lambda rows, seed: None})


def test_a_draw_is_of_its_seed_and_divides_no_clone(tmp_path):
    from tiny_models import HEAVY, LIGHT

    def cdr3(text: str) -> str:
        return HEAVY.replace("DRGYSYG", text)

    rows = []
    for i, text in enumerate(["WWWWWWW", "CCCCCCC", "HHHHHHH", "MMMMMMM", "QQQQQQQ", "PPPPPPP"]):
        for relative in range(2):
            letters = cdr3(text).replace("EVQLVES", "EVQLVDS" if relative else "EVQLVES")
            rows.append((f"{i}{relative}", "AB"[i % 2], letters, LIGHT))
    path = tmp_path / "specificity.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("name", "label", "h_sequence", "l_sequence"), *rows])
    draw = overfitting.specificity(path)
    found, again, other = draw(12, 0), draw(12, 0), draw(12, 1)
    assert [a.heavy for a in found.antibodies] == [a.heavy for a in again.antibodies]
    assert [a.heavy for a in found.antibodies] != [a.heavy for a in other.antibodies]
    assert not any(a.light for a in found.antibodies)
    assert np.bincount(found.targets).tolist() == [6, 6]
    sides: dict[str, set[bool]] = {}
    for antibody, held in zip(found.antibodies, found.held.tolist(), strict=True):
        sides.setdefault(antibody.heavy[96:106], set()).add(held)
    assert len(sides) == 6 and all(len(each) == 1 for each in sides.values())
