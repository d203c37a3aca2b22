"""The report of an evaluation: tables of numbers, escaping, self-containedness, a real browser."""

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest
from browser import browse
from conftest import REPO
from synthetic_evaluations import (
    about,
    gain_outcome,
    loss_outcome,
    routing_outcome,
    write_evaluation,
)

from moe_ablm.evaluation.estimates import Number
from moe_ablm.evaluation.outcome import Outcome, Picture, Table
from moe_ablm.evaluation.reporting.claims import claims_of
from moe_ablm.evaluation.reporting.compare import compare
from moe_ablm.evaluation.reporting.compare_report import write_comparison
from moe_ablm.evaluation.reporting.references import HEADLINES
from moe_ablm.evaluation.reporting.report import (
    headlines,
    interval_written,
    numbers_table,
    section,
    written,
)
from moe_ablm.evaluation.reporting.results import read_evaluated
from moe_ablm.evaluation.suite import EVALUATIONS, as_json, module_of

HOSTILE = "<script>throw 'x'</script><img src=x onerror=alert(1)> & \"quoted\""
MINUS = "\N{MINUS SIGN}"


class Reader(HTMLParser):
    """Cells of tables; whether every tag is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.references: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe", "object"), tag
        self.references += [v for k, v in attributes if k in ("src", "href")]
        if tag not in ("meta", "img", "br", "path", "circle"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        if tag not in ("path", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data


def page(text: str) -> Reader:
    reader = Reader(text)
    assert not reader.open
    assert all(r.startswith(("#", "data:image/")) for r in reader.references), "not self-contained"
    return reader


def numbers(*rows) -> list[dict]:
    return [as_json(Number(*row)) for row in rows]


def draw():
    figure, axis = plt.subplots()
    axis.plot([0, 1])
    return figure


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """An evaluation with figures, a long table, skipped parts, and text that wants to be HTML."""
    loss = loss_outcome(0.0, 1)
    rows = [Number("share", i / 50, {"V gene": f"{HOSTILE}{i}"}, n=i) for i in range(50)]
    tables = (
        Table("Test sets", ("loss", "perplexity"), ("test set",), where=(("region", "all"),)),
        Table("Many " + HOSTILE, ("share",), ("V gene",)),
        Table("of nothing", ("no such metric",)),
    )
    pictures = [Picture("one", "First " + HOSTILE, draw), Picture("two", "Second", draw)]
    full = Outcome(loss.samples, rows, tables, pictures, ["a note " + HOSTILE])
    return write_evaluation(
        tmp_path_factory.mktemp("report") / "x",
        about("topk", "x", source=f"runs/{HOSTILE}, step 3", tokens_seen=None),
        perplexity=full,
        attention="single chains only " + HOSTILE,
        routing=routing_outcome(0.8, 0.1),
    )


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (0.29312, 0.28101, 0.30499, "0.293 [0.281, 0.305]"),
        (12345.6, 12000.0, 13000.0, "12,346 [12,000, 13,000]"),
        (-0.5, -0.9, -0.1, f"{MINUS}0.50 [{MINUS}0.90, {MINUS}0.10]"),
        (2.34567, None, None, "2.346"),
        (0.00012345, None, None, "0.000123"),
        (0.00001234, None, None, f"1.23e{MINUS}05"),
        (None, None, None, "-"),
        (0.5, 0.5, 0.5, "0.5000 [0.5000, 0.5000]"),
        (0.0, None, None, "0"),
    ],
)
def test_values_have_the_digits_that_their_intervals_deserve(value, low, high, expected):
    assert interval_written({"value": value, "low": low, "high": high}) == expected
    assert written(float("nan")) == "-"


def test_a_table_is_laid_out_by_labels():
    found = numbers(
        ("gain", 0.1, {"masked": "heavy", "partner": "random"}, 0.0, 0.2, 10, "nats"),
        ("gain", 0.3, {"masked": "heavy", "partner": "none"}, 0.2, 0.4, 10, "nats"),
        ("gain", 0.5, {"masked": "light", "partner": "random"}, 0.4, 0.6, 12, "nats"),
        ("other", 9.0, {"masked": "light", "partner": "random"}),
    )
    table = asdict(Table("Gain", ("gain",), ("masked",), "partner"))
    assert page(numbers_table(found, table)).tables == [
        [
            ["masked", "random", "none", "n"],
            ["heavy", "0.10 [0.00, 0.20]", "0.30 [0.20, 0.40]", "10"],
            ["light", "0.50 [0.40, 0.60]", "-", "12"],
        ]
    ]


def test_metrics_are_columns_and_where_selects():
    none = (float("nan"), float("nan"))
    found = numbers(
        ("loss", 1.0, {"set": "a", "region": "all"}, *none, 7, "nats"),
        ("loss", 2.0, {"set": "a", "region": "CDR1"}, *none, 3, "nats"),
        ("hits", 0.5, {"set": "a", "region": "all"}, *none, 7, "share"),
    )
    where = asdict(Table("t", ("hits", "loss"), ("set",), where=(("region", "all"),)))
    assert page(numbers_table(found, where)).tables[0] == [
        ["set", "hits (share)", "", "loss (nats)", "n"],
        ["a", "0.5000", "", "1.000", "7"],
    ]


def test_labels_that_a_table_does_not_name_become_rows():
    found = numbers(
        *(("x", float(i), {"layer": str(i), "same": "s"}, 0.0, 9.0, 1) for i in range(3))
    )
    rows = page(numbers_table(found, asdict(Table("t", ("x",))))).tables[0]
    assert [r[0] for r in rows] == ["layer", "0", "1", "2"]
    assert numbers_table(found, asdict(Table("t", ("y",)))) == ""


def test_the_report_holds_everything_escaped(directory):
    text = (directory / "report.html").read_text()
    reader = page(text)
    assert "<script" not in text and "onerror=alert(1)>" not in text
    for part in ("a note &lt;script&gt;", "single chains only &lt;", "First &lt;script", "skipped"):
        assert part in text
    assert text.count("data:image/png;base64,") == 2
    assert "<details><summary>Many" in text and "of nothing" not in text
    facts = {row[0]: row[1] for row in reader.tables[0]}
    assert facts["Parameters"] == "3,000, of which 1,000 active" and facts["Trained on"] == "paired"
    assert "numpy" in facts["Versions"]


def test_the_summary_tells_headlines_and_why_there_are_none(directory):
    summary = page((directory / "report.html").read_text()).tables[1]
    content = json.loads((directory / "results.json").read_text())
    loss = content["evaluations"]["perplexity"]["numbers"][0]
    rows = {row[0]: row for row in summary if row[0]}
    value, low, high = (f"{loss[k]:.2f}" for k in ("value", "low", "high"))
    assert rows["Perplexity"][2] == f"{value} [{low}, {high}] nats"
    assert rows["Perplexity"][1] == "loss on pairs" and "650M 0.240" in rows["Perplexity"][3]
    assert "single chains only" in rows["Attention"][1]
    assert rows["Routing"][2].startswith("0.80 [0.70, 0.90]")


def test_headlines_are_of_evaluations_that_there_are():
    assert set(HEADLINES) <= set(EVALUATIONS)
    found = numbers(("loss", 1.5, {"test set": "paired", "region": "CDRH3"}))
    assert [h.text for h, _ in headlines("perplexity", found)] == ["loss on pairs, CDRH3"]
    assert headlines("perplexity", []) == []


@pytest.mark.parametrize("changed", [False, True])
def test_an_evaluation_says_how_to_do_it_alone(changed, tmp_path):
    settings = asdict(module_of("perplexity").Settings()) | ({"repeats": 9} if changed else {})
    kept = {"title": "t", "about": "a", "status": "done", "notes": [], "numbers": [], "tables": [],
            "pictures": [], "settings": settings, "seconds": 3.4}  # fmt: skip
    text = "".join(section("perplexity", kept, tmp_path, ["python", "-m", "x", "--run", "a b"]))
    line = "python -m x --run &#x27;a b&#x27; --suite perplexity"
    assert (line + " ") in text or (line + ".py ") in text
    assert ("repeats&#x27;: 9" in text) == changed
    if changed:  # the file that is shown is one that the verb reads
        file = re.search(r"# perplexity.py\n(.*)</pre>", text, re.DOTALL)[1]
        scope: dict = {}
        exec(file.replace("&#x27;", "'"), scope)
        assert scope["get_config"]().to_dict() == {"perplexity": settings}


def test_a_report_in_a_browser(directory):
    seen = browse(directory / "report.html")
    assert seen["console"] == []
    assert len(seen["images"]) == 2 and min(seen["images"]) > 100
    assert seen["scripts"] == 0 and seen["lost"] == [] and seen["beyond"] <= 0
    assert "Summary" in seen["text"] and HOSTILE in seen["text"]


def test_a_comparison_in_a_browser(tmp_path):
    runs = []
    for i, (kind, router) in enumerate([("dense", "none"), ("top2", "topk"), (HOSTILE, "soft")]):
        routing = routing_outcome(0.5, 0.1) if router != "none" else "dense"
        path = write_evaluation(
            tmp_path / f"{i}",
            about(router, str(i)),
            perplexity=loss_outcome(-0.05 * i, i),
            mutations=gain_outcome(0.1),
            routing=routing,
        )
        runs.append(read_evaluated(kind, path))
    comparison = compare(runs)
    files = write_comparison(tmp_path, comparison, claims_of(comparison), ["python", HOSTILE])
    page(files[2].read_text())
    seen = browse(files[2])
    assert seen["console"] == [] and seen["scripts"] == 0 and seen["lost"] == []
    assert len(seen["images"]) == 1 and min(seen["images"]) > 100 and seen["beyond"] <= 0
    assert "What holds" in seen["text"] and "nats gained on all residues" in seen["text"]


@pytest.mark.parametrize("name", ["comparison", "top2"])
def test_the_reports_of_the_docs_in_a_browser(tmp_path, name):
    page = tmp_path / f"{name}.html"
    page.write_bytes((REPO / "docs" / "reports" / page.name).read_bytes())
    seen = browse(page)
    assert seen["console"] == [] and seen["scripts"] == 0 and seen["lost"] == []
    assert seen["images"] and min(seen["images"]) > 100 and seen["beyond"] <= 0
    assert {"comparison": "What holds", "top2": "Expert specialisation"}[name] in seen["text"]


def test_the_browser_sees_what_is_wrong(tmp_path):
    """The tests above are worth what this one is."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><body style='width:3000px'><img src='data:image/png;base64,AAAA'>"
        "<a href='#nowhere'>x</a><script>undefined_function()</script></body>"
    )
    seen = browse(bad)
    assert any("undefined_function" in line for line in seen["console"])
    assert seen["images"] == [0] and seen["lost"] == ["#nowhere"]
    assert seen["scripts"] == 1 and seen["beyond"] > 1000


def test_intervals_are_drawn_to_a_common_axis():
    found = numbers(
        *(("x", v, {"r": str(v)}, v - 1, v + 1, 1) for v in (0.0, 5.0, 10.0)),
    )
    text = numbers_table(found, asdict(Table("t", ("x",), ("r",))))
    dots = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', text)]
    assert np.diff(dots) == pytest.approx([dots[1] - dots[0]] * 2, abs=0.11) and len(dots) == 3
    assert text.count("<svg") == 3
