"""`benchmarks/coverage.py` goes on where it was, whatever it was stopped by."""

import json

import numpy as np
import pytest

from benchmarks import coverage


def test_tables_are_appended_and_none_is_done_twice(tmp_path, capsys):
    out = tmp_path / "coverage.jsonl"
    flags = ["--law", "compute", "--draws", "0", "--out", str(out)]
    coverage.main([*flags, "--tables", "1"])
    first = out.read_text()
    entry = json.loads(first)
    assert entry["seed"] == 0 and set(entry["inside"]["profile"]) == set(coverage.BEST)
    out.write_text(first + '{"case": "compute", "se')  # killed while it wrote
    coverage.main([*flags, "--tables", "2"])
    assert out.read_text().startswith(first)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 1]
    capsys.readouterr()
    coverage.main([*flags, "--tables", "5", "--cpu-minutes", "0"])
    said = capsys.readouterr().out
    assert "3 of 3 tables are left" in said and "gain[x] " in said
    assert len(out.read_text().splitlines()) == 2


def test_the_shares_are_those_of_the_tables():
    done = {
        ("compute", seed): {"profile": {"alpha": seed < 3}, "bootstrap": {}} for seed in range(4)
    }
    cells = [list(column.cells) for column in coverage.table_of(done).columns]
    assert cells[2] == ["4", "4"] and str(cells[3][0]) == "alpha 75.0"


def test_every_case_is_fitted_at_its_truth(tmp_path, capsys):
    """A cheap one to the end; of all, the truth is a law's and the grid has its columns."""
    for case in coverage.CASES.values():
        runs = coverage.simulate(case, 0)
        law = coverage.saved_law(case.law, case.routers, case.covariates)
        assert set(case.truth) == set(law.names) and set(law.needs) <= {*runs.columns, "experts"}
        assert np.isfinite(runs["loss"]).all()
    out = tmp_path / "quick.jsonl"
    flags = ["--quick", "--law", "chinchilla", "--tables", "60", "--out", str(out)]
    coverage.main(flags)
    lines = map(json.loads, out.read_text().splitlines())
    shares = [line["inside"]["standard error"] for line in lines]
    assert set(shares[0]) == set(coverage.DENSE)
    assert 0.85 < np.mean([list(share.values()) for share in shares]) < 0.99
    assert "standard error" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):  # a file is of one kind of intervals
        coverage.main([*flags[1:], "--draws", "0"])
    assert "with and without --quick" in capsys.readouterr().err
