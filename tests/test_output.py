"""Results on disk: formats, resumption, refusals."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from strict_json import read_strictly

from moe_ablm.errors import UserError
from moe_ablm.inference.output import WRITERS, Output, in_float32, vectors

COMMAND = {"verb": "embed", "options": {"level": "chain"}}
PARTS = [
    {"id": ["a", "bcd"], "n": [1, 2], "x": [0.5, float("nan")], "v": [[1, 2, 3], [4, 5, 6]]},
    {"id": ["e,é"], "n": [3], "x": [-1.25], "v": [[7, 8, 9.5]]},
]


def part(number: int) -> pa.Table:
    columns = dict(PARTS[number])
    return pa.table(columns | {"v": vectors(np.array(columns["v"], np.float32))})


def write(out, command=COMMAND) -> None:
    if out.suffix == ".h5ad":
        pytest.importorskip("anndata")
    with Output(out, command) as output:
        for number in range(2):
            output.add(part(number), len(PARTS[number]["id"]))
        assert output.finish() == 3


def read(out) -> dict[str, list]:
    if out.suffix == ".h5ad":
        found = pytest.importorskip("anndata").read_h5ad(out)
        return {**found.obs.to_dict("list"), "v": found.X.tolist()}
    if out.suffix == ".npz":
        with np.load(out, allow_pickle=False) as arrays:
            return {name: arrays[name].tolist() for name in arrays.files}
    if out.suffix == ".parquet":
        return pq.read_table(out).to_pydict()
    if out.suffix == ".jsonl":
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        return {name: [line[name] for line in lines] for name in lines[0]}
    with out.open() as stream:
        lines = list(csv.DictReader(stream))
    found = {"id": [r["id"] for r in lines], "n": [int(r["n"]) for r in lines]}
    found["x"] = [float(r["x"]) if r["x"] else None for r in lines]
    found["v"] = [[float(r[f"v_{i}"]) for i in range(3)] for r in lines]
    return found


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_holds_the_same(tmp_path, suffix):
    if suffix == ".h5ad":
        pytest.importorskip("anndata")
    out = tmp_path / f"a{suffix}"
    write(out)
    found = read(out)
    assert found["id"] == ["a", "bcd", "e,é"] and found["n"] == [1, 2, 3]
    assert found["v"] == [[1, 2, 3], [4, 5, 6], [7, 8, 9.5]]
    assert found["x"][::2] == [0.5, -1.25]
    assert found["x"][1] is None or np.isnan(found["x"][1])
    assert {p.name for p in tmp_path.iterdir()} == {out.name, f".{out.name}.command.json"}


def test_lines_of_jsonl_are_valid_json(tmp_path):
    out = tmp_path / "a.jsonl"
    with Output(out, COMMAND) as output:
        values = pa.array([[1.0, np.nan], [np.inf, 2.0]], pa.list_(pa.float32()))
        output.add(pa.table({"x": [np.nan, -np.inf], "v": values}), 2)
        output.finish()
    assert read_strictly(out) == [{"x": None, "v": [1.0, None]}, {"x": None, "v": [None, 2.0]}]


@pytest.mark.parametrize("suffix", WRITERS)
def test_what_was_kept_is_not_computed_again(tmp_path, suffix):
    write(tmp_path / f"whole{suffix}")
    out = tmp_path / f"a{suffix}"
    with pytest.raises(KeyboardInterrupt), Output(out, COMMAND) as output:
        assert output.done == 0
        output.add(part(0), 2)
        raise KeyboardInterrupt
    assert not out.exists()
    with Output(out, COMMAND) as output:
        assert output.done == 2
        output.add(part(1), 1)
        output.finish()
    whole = (tmp_path / f"whole{suffix}").read_bytes()
    if suffix != ".npz":  # a zip archive knows when it was written
        assert out.read_bytes() == whole
    assert str(read(out)) == str(read(tmp_path / f"whole{suffix}"))
    with Output(out, COMMAND) as output:
        assert output.complete


def test_a_half_written_part_is_no_part(tmp_path):
    out = tmp_path / "a.csv"
    with pytest.raises(KeyboardInterrupt), Output(out, COMMAND) as output:
        output.add(part(0), 2)
        (tmp_path / ".a.csv.parts" / "writing").write_bytes(b"PAR1 and no more")
        # a part that does not follow on the others
        pq.write_table(part(1), tmp_path / ".a.csv.parts" / f"{7:012d}-{8:012d}.parquet")
        raise KeyboardInterrupt
    with Output(out, COMMAND) as output:
        assert output.done == 2


def test_another_command_is_refused(tmp_path):
    out = tmp_path / "a.csv"
    with pytest.raises(KeyboardInterrupt), Output(out, COMMAND) as output:
        output.add(part(0), 2)
        raise KeyboardInterrupt
    other = COMMAND | {"options": {"level": "residue"}}
    words = r"unfinished results of another command \(other options\).*\.a\.csv\.parts"
    with pytest.raises(UserError, match=words), Output(out, other):
        pass
    with Output(out, COMMAND) as output:
        output.add(part(1), 1)
        output.finish()
    with pytest.raises(UserError, match=r"there already \(other options\): choose a new name"):
        Output(out, other)


def test_a_file_that_is_there_is_never_overwritten(tmp_path):
    out = tmp_path / "a.csv"
    out.write_text("mine\n")
    with pytest.raises(UserError, match="a.csv is there already: choose"):
        Output(out, COMMAND)
    out.unlink()
    write(out)
    out.write_text(out.read_text() + "changed\n")
    with pytest.raises(UserError, match="is there already"):
        Output(out, COMMAND)


def test_one_process_at_a_time(tmp_path):
    out = tmp_path / "a.csv"
    refused = pytest.raises(UserError, match="another process")
    with Output(out, COMMAND), refused, Output(out, COMMAND):
        pass


def test_nothing_is_left_where_nothing_was_computed(tmp_path):
    refused = pytest.raises(UserError, match="no antibody is left")
    with refused, Output(tmp_path / "a.csv", COMMAND) as output:
        output.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "words"), [("a.txt", r"ends in \.csv"), (".", "ends in")])
def test_names_that_are_no_result(tmp_path, name, words):
    with pytest.raises(UserError, match=words):
        Output(tmp_path / name, COMMAND)


def test_lines_have_the_digits_of_float32(tmp_path):
    """Read again they are the same float32; 0.1 is no 0.10000000149011612."""
    x = pa.array([0.1, None, float("nan"), 1e-30], pa.float32())
    v = vectors(np.array([[0.1, 1 / 3], [2.0, -1e8], [0.7, 0.0], [1.5, 2.5]], np.float32))
    with Output(tmp_path / "o.jsonl", COMMAND) as output:
        output.add(pa.table({"x": x, "v": v, "n": [1, 2, 3, 4]}), 4)
        output.finish()
    text = (tmp_path / "o.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["x"] for line in lines] == [0.1, None, None, 1e-30]
    assert [line["n"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["v"] == [0.1, 0.33333334] and lines[1]["v"] == [2.0, -1e8]
    found = np.array([line["v"] for line in lines], np.float32)
    assert found.tobytes() == np.array(v.to_pylist(), np.float32).tobytes()


def test_all_formats_write_the_same_digits(tmp_path):
    values = np.random.default_rng(0).normal(size=50).astype(np.float32).astype(np.float64) / 3
    table = in_float32({"id": ["a"] * 50, "n": list(range(50)), "x": values, "v": vectors(
        np.ones((50, 3), np.float32))})  # fmt: skip
    expected = [str(np.float32(value)) for value in values]
    for suffix in (".csv", ".jsonl"):
        with Output(tmp_path / f"o{suffix}", COMMAND) as output:
            output.add(table, 50)
            output.finish()
        assert list(map(str, read(tmp_path / f"o{suffix}")["x"])) == expected


@pytest.mark.parametrize("suffix", [suffix for suffix in WRITERS if suffix != ".h5ad"])
def test_what_an_earlier_version_began_is_finished_alike(tmp_path, suffix):
    """Sums were float64 then; the file has one type, and is the one that is written at once."""
    half, whole = tmp_path / f"half{suffix}", tmp_path / f"whole{suffix}"
    with pytest.raises(KeyboardInterrupt), Output(half, COMMAND) as output:
        output.add(part(0).set_column(2, "x", pa.array([1 / 3, 0.1], pa.float64())), 2)
        raise KeyboardInterrupt
    now = [in_float32(part(0).set_column(2, "x", pa.array([1 / 3, 0.1]))), in_float32(part(1))]
    with Output(half, COMMAND) as output:
        assert output.done == 2
        output.add(now[1], 1)
        output.finish()
    with Output(whole, COMMAND) as output:
        for number, table in enumerate(now):
            output.add(table, len(PARTS[number]["id"]))
        output.finish()
    assert str(read(half)) == str(read(whole))
    if suffix in (".csv", ".jsonl"):
        assert half.read_text() == whole.read_text() and "0.33333334" in half.read_text()
    if suffix == ".parquet":
        assert pq.read_schema(half).field("x").type == pa.float32()
