"""`python -m moe_ablm fit`: what it writes, what it says, and exit codes."""

import json
import subprocess
import sys

import numpy as np
import pytest

from moe_ablm.__main__ import main
from moe_ablm.scaling import load, read_runs
from moe_ablm.scaling.laws_dense import Chinchilla, DataConstrainedB2

DENSE = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.37}


def write_table(path, columns):
    rows = zip(*columns.values(), strict=True)
    lines = [",".join(columns), *(",".join(map(repr, map(float, row))) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def dense_csv(tmp_path):
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(4e7, 1e10, 5), np.geomspace(1e9, 3e11, 5)))
    loss = Chinchilla().predict(DENSE, {"params": n, "tokens": d})
    loss = loss * np.exp(2e-3 * np.random.default_rng(0).standard_normal(25))
    return write_table(tmp_path / "runs.csv", {"params": n, "tokens": d, "loss": loss})


@pytest.fixture
def repeated_csv(tmp_path):
    n, u, k = np.meshgrid(np.geomspace(1e7, 3e9, 5), [1e9, 1e10], [1.0, 8.0, 64.0])
    table = {"params": n.ravel(), "unique_tokens": u.ravel(), "tokens": (u * k).ravel()}
    values = DENSE | {"P": 0.03, "delta": 0.8, "kappa": 0.6}
    loss = DataConstrainedB2().predict(values, table)
    loss = loss * np.exp(2e-3 * np.random.default_rng(0).standard_normal(30))
    return write_table(tmp_path / "repeated.csv", table | {"loss": loss})


def fit(*flags):
    return main(["moe_ablm", "fit", *map(str, flags)])


def test_a_fit_writes_everything_and_reloads(dense_csv, tmp_path, capsys):
    out = tmp_path / "out"
    code = fit("--input", dense_csv, "--law", "chinchilla", "--bootstrap", 60,
               "--target", "flops=1e22", "--published", "chinchilla", "--out", out)  # fmt: skip
    said = capsys.readouterr()
    assert code == 0 and not said.err
    assert "482.01 (124.5)" in said.out and "95 % profile" in said.out
    assert "exponent_ratio" in said.out and "sensitivity to the Huber delta" in said.out
    saved = json.loads((out / "fit.json").read_text())
    assert {i["method"] for i in saved["intervals"]["alpha"]} == {"bootstrap", "profile"}
    assert {i["method"] for i in saved["intervals"]["N_opt"]} == {"bootstrap", "profile"}
    assert load(out).predict(params=1e9, tokens=1e11).item() == pytest.approx(2.3, abs=0.2)
    for name in ("loss_against_params", "isoflop", "frontier", "optimum", "profiles", "residuals"):
        assert (out / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (out / "figures" / f"{name}.svg").read_bytes()
    page = (out / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 6
    assert "<script" not in page and "http://" not in page and 'src="data:' in page
    assert not list(out.rglob(".*"))


def test_the_same_command_writes_the_same_bytes(dense_csv, tmp_path):
    for name in ("a", "b"):
        assert fit("--input", dense_csv, "--law", "chinchilla", "--bootstrap", 40,
                   "--out", tmp_path / name) == 0  # fmt: skip
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) >= 10
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_compare_is_the_default_and_says_which_law(repeated_csv, tmp_path, capsys):
    out = tmp_path / "out"
    assert fit("--input", repeated_csv, "--bootstrap", 40, "--out", out) == 0
    text = capsys.readouterr().out
    assert "The data support data_constrained_b2" in text
    comparison = json.loads((out / "comparison.json").read_text())
    assert comparison["laws"][0]["law"] == "data_constrained_b2"
    assert load(out).law.name == "data_constrained_b2"
    assert "The data support" in (out / "report.html").read_text()


def test_advice_and_next_run(repeated_csv, tmp_path, capsys):
    code = fit("--input", repeated_csv, "--law", "data_constrained_b2", "--bootstrap", 40,
               "--target", "tokens=6.4e10,unique_tokens=1e9", "--advise", "--max-flops", 1e21,
               "--max-unique", 1e9, "--next-run", repeated_csv,
               "--out", tmp_path / "o")  # fmt: skip
    text = capsys.readouterr().out
    assert code == 0
    assert "best model under the limits" in text and "worth of more unique data" in text
    assert "reduction of var(ln N_star) per FLOP" in text
    assert "worth of more unique data" in (tmp_path / "o" / "report.html").read_text()


def test_a_design_is_checked_without_losses(tmp_path, capsys):
    grid = {"params": [8e6, 35e6, 150e6, 350e6, 650e6, 1e9], "tokens": [2e10] * 6}
    path = write_table(tmp_path / "grid.csv", grid)
    code = fit("--design", "--input", path, "--law", "chinchilla", "--out", tmp_path / "o")
    assert code == 0
    assert "same total tokens" in capsys.readouterr().out
    saved = json.loads((tmp_path / "o" / "design.json").read_text())
    assert saved["identifiable"]["beta"] is False and saved["expected_errors"]["beta"] is None


def test_parabolas_and_envelope_write_their_files(tmp_path, capsys):
    sizes = np.tile([8e6, 35e6, 150e6, 350e6], 2)
    data = np.repeat([4e5, 8e5], 4)
    loss = 0.25 + 0.003 * np.log10(sizes / (data * 80)) ** 2
    loss += 1e-5 * np.random.default_rng(0).standard_normal(8)
    path = write_table(tmp_path / "q.csv", {"N": sizes, "U": data, "L": loss})
    code = fit("--input", path, "--columns", "params=N,unique_pairs=U,loss=L", "--law",
               "quadratic", "--target", "params=650e6", "--out", tmp_path / "q")  # fmt: skip
    assert code == 0 and "data_needed" in capsys.readouterr().out
    saved = json.loads((tmp_path / "q" / "fit.json").read_text())
    assert saved["data_unit"] == "pairs" and "data_needed" in saved["intervals"]
    n = np.repeat(np.geomspace(1e7, 1e9, 5), 30)
    d = np.tile(np.geomspace(2e7, 1e12, 30), 5)
    curves = {"params": n, "tokens": d, "loss": 1.7 + 300 * n**-0.34 + 400 * d**-0.34}
    path = write_table(tmp_path / "e.csv", curves)
    assert (
        fit("--input", path, "--law", "envelope", "--bootstrap", 30, "--out", tmp_path / "e") == 0
    )
    assert load(tmp_path / "e").predict(params=1e8, flops=1e19).item() > 1.7


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--law", "kaplan"], ["--law kaplan", "chinchilla"]),
        (["--law", "joint"], ["needs the column 'total_params'"]),
        (["--columns", "params"], ["--columns 'params'", "NAME=VALUE"]),
        (["--columns", "params=width"], ["no such column", "params, tokens, loss"]),
        (["--fix", "alpha=big"], ["--fix alpha=big", "number"]),
        (["--law", "chinchilla", "--fix", "omega=1"], ["omega", "no such coefficient"]),
        (["--law", "chinchilla", "--huber-delta", "-1"], ["--huber-delta", "positive"]),
        (["--bootstrap", "-5"], ["--bootstrap -5"]),
        (["--law", "chinchilla", "--advise"], ["--max-flops"]),
        (["--law", "chinchilla", "--where", "tokens=7"], ["no usable row", "--where"]),
        (["--seed", "-1"], ["--seed -1"]),
        (["--seed-sd", "nan"], ["--seed-sd nan", "expected a number"]),
        (["--max-flops", "inf"], ["--max-flops inf", "positive"]),
        (["--columns", "params=params,params=tokens"], ["params", "twice"]),
        (["--law", "chinchilla", "--target", "flop=1"], ["--target", "unknown input flop"]),
        (["--target", "unique_pairs=1e6"], ["--target unique_pairs", "--tokens-per-pair"]),
        (["--law", "isoflop", "--fix", "a=1"], ["--fix", "isoflop"]),
        (["--law", "chinchilla", "--published", "ablm"], ["--published ablm", "quadratic"]),
        (["--law", "chinchilla", "--huber-delta", "1e-300"], ["--huber-delta", "at least"]),
    ],
)
def test_wrong_input_is_one_line_on_stderr_and_code_2(dense_csv, tmp_path, capsys, flags, words):
    base = ["--input", dense_csv, "--out", tmp_path / "out", "--bootstrap", "20"]
    assert fit(*base, *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def test_importing_the_package_loads_neither_jax_nor_scipy_nor_matplotlib():
    code = (
        "import sys, moe_ablm.scaling as s; s.load; s.read_runs; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'jax', 'matplotlib', 'scipy', "
        "'pyarrow', 'rich'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_fitting_never_imports_jax(dense_csv):
    code = (
        "import sys; from moe_ablm.scaling import read_runs, fit_law, bootstrap, profiles; "
        f"made = fit_law(read_runs([{dense_csv!r}])); bootstrap(made, 10); profiles(made); "
        "print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_out_below_a_file_is_refused_before_anything_is_fitted(dense_csv, capsys):
    assert fit("--input", "absent.csv", "--out", f"{dense_csv}/fit") == 2
    assert "runs.csv is not a directory" in capsys.readouterr().err


def test_equal_losses_end_in_a_verdict_with_figures(tmp_path, capsys):
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(4e7, 1e10, 4), np.geomspace(1e9, 3e11, 3)))
    path = write_table(tmp_path / "e.csv", {"params": n, "tokens": d, "loss": np.full(12, 3.0)})
    code = fit("--input", path, "--law", "chinchilla", "--bootstrap", 30, "--out", tmp_path / "o")
    assert code == 0 and (tmp_path / "o" / "figures" / "loss_against_params.svg").is_file()
    assert load(tmp_path / "o").status != "converged"


def test_a_target_may_be_in_pairs(tmp_path):
    sizes, pairs = np.tile([8e6, 35e6, 150e6, 350e6], 2), np.repeat([4e5, 8e5], 4)
    loss = 0.25 + 0.003 * np.log10(sizes / (pairs * 80)) ** 2
    path = write_table(tmp_path / "q.csv", {"params": sizes, "unique_pairs": pairs, "loss": loss})
    base = ["--input", path, "--law", "quadratic", "--bootstrap", 50]
    assert fit(*base, "--target", "unique_pairs=1.6e6", "--out", tmp_path / "pairs") == 0
    assert load(tmp_path / "pairs").derived["N_star"] == pytest.approx(1.28e8, rel=1e-3)
    tokens = ["--tokens-per-pair", 200, "--target", "unique_pairs=1.6e6"]
    assert fit(*base, *tokens, "--out", tmp_path / "tokens") == 0
    assert load(tmp_path / "tokens").derived["N_star"] == pytest.approx(1.28e8, rel=1e-3)


def test_dropped_rows_of_one_kind_are_one_line(dense_csv, tmp_path, capsys):
    twice = ["--input", dense_csv, "--input", dense_csv, "--law", "chinchilla", "--bootstrap", 0]
    assert fit(*twice, "--out", tmp_path / "o") == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("dropped")]
    assert len(lines) == 1 and "24 more" in lines[0] and "duplicate" in lines[0]


def test_a_fit_says_from_what_and_how_it_was_made(dense_csv, tmp_path):
    base = ["--input", dense_csv, "--law", "chinchilla", "--bootstrap", 20, "--seed", 3]
    assert fit(*base, "--out", tmp_path / "a") == 0
    made = json.loads((tmp_path / "a" / "fit.json").read_text())
    told = made["provenance"]
    assert told["seed"] == 3 and told["draws"] == made["draws"] == 20 and made["draws_lost"] == 0
    assert told["flags"]["law"] == ["chinchilla"] and told["flags"]["input"] == [dense_csv]
    runs = read_runs([dense_csv])
    assert told["rows_sha256"] == runs.digest() == load(tmp_path / "a").provenance["rows_sha256"]
    assert runs.digest() != runs.take(np.arange(24)).digest()
