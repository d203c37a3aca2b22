"""Lines of `results.jsonl` after a crash."""

from moe_ablm.results import keep_until, read_results


def test_a_line_cut_off_is_left_out_and_later_steps_are_dropped(tmp_path):
    path = tmp_path / "results.jsonl"
    assert read_results(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    assert [r["step"] for r in read_results(path)] == [1, 2, 3]
    keep_until(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["results.jsonl"]


def test_bytes_that_are_no_text_end_the_reading(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\x00\x00\n{"step": 2}\n')
    assert read_results(path) == [{"step": 1}]
