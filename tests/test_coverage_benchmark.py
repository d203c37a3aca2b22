"""`benchmarks/coverage.py` goes on where it was, whatever it was stopped by."""

import json

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
