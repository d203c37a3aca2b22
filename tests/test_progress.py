"""What a terminal shows while something takes long, at 80 and 120 columns."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn

from moe_ablm.data.readers import open_sources
from moe_ablm.progress import Progress, WatchedBar
from moe_ablm.verbs.reading import Course

ROWS = 20_000


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Pairs, in one row group of a parquet file; every fourth has no chain."""
    heavy = ["EVQLVESGGG" if n % 4 else "" for n in range(ROWS)]
    light = ["DIQMTQSPSS" if n % 4 else "" for n in range(ROWS)]
    file = tmp_path_factory.mktemp("tables") / "pairs.parquet"
    columns = {"sequence_aa_heavy": heavy, "sequence_aa_light": light}
    pq.write_table(pa.table(columns), file, row_group_size=ROWS)
    return file


def test_rows_are_known_from_the_first_batch_on(table):
    """Also of a file in one piece, which gave nothing until its end."""
    sources = open_sources([str(table)])
    course, seen = Course(sources), []
    assert (course.rows(), course.antibodies(), course.at) == (None, None, "pairs.parquet")
    for batch in sources[0].batches():
        seen.append((course.settled, course.rows(), course.antibodies(), course.at))
        sources[0].report.kept += batch.num_rows
    settled, rows, antibodies, at = zip(*seen, strict=True)
    assert len(seen) > 2 and settled[0] < ROWS / 4 and sorted(settled) == list(settled)
    assert all(abs(n - ROWS) < 0.02 * ROWS for n in rows)
    assert all(abs(n - 0.75 * ROWS) < 0.02 * ROWS for n in antibodies)
    assert set(at) == {"pairs.parquet"}
    # then nothing is left to read, and what remains is something else
    assert (course.settled, course.rows(), course.antibodies(), course.at) == (
        ROWS,
        ROWS,
        15_000,
        "",
    )


@pytest.mark.parametrize("width", [80, 120])
def test_a_bar_looks_whenever_it_is_drawn(width):
    out, done = io.StringIO(), iter(range(0, 100_000, 1000))
    console = Console(file=out, force_terminal=True, width=width)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn())

    def look():
        return {"completed": next(done), "total": 99_000, "description": "pairs.parquet"}

    with WatchedBar(look, *columns, console=console) as bar:
        bar.refresh()
    assert "pairs.parquet" in out.getvalue() and " 2000/99000" in out.getvalue()


def test_silent_without_a_terminal(capsys):
    with WatchedBar(lambda: {"completed": 1, "total": 2}, MofNCompleteColumn()):
        pass
    assert capsys.readouterr() == ("", "")


def test_the_trainer_says_that_it_compiles(capsys):
    with Progress(10, 0) as progress:
        progress.busy("compiling the update")
        progress.note("compiled in 3.0 s")
    assert capsys.readouterr().out == "compiling the update ...\ncompiled in 3.0 s\n"
