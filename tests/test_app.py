"""The page of `moe-ablm app`: its boxes of regions, refusals, and in a browser."""

import os
import signal
import socket
import subprocess
import sys

import pytest
from browser import visiting
from conftest import command, run_command
from test_cli import refused
from tiny_models import tiny_model

from moe_ablm import app
from moe_ablm.interop.saved import save_model


def test_boxes_of_regions():
    labels = {
        "chain": ["heavy"] * 4,
        "region": ["FRH1", "FRH1", "CDRH1", ""],
        "number": ["1", "2", "27", ""],
        "residue": ["E", "<", "G", "A"],
    }
    html = app.regions_html(labels)
    assert "FRH1 1-2" in html and '<div class="cdr"><small>CDRH1 27-27' in html
    assert "heavy no number" in html and "&lt;" in html and "><<" not in html


def test_without_panel_one_line_says_what_to_install(main, monkeypatch):
    monkeypatch.setitem(sys.modules, "panel", None)
    refused(main("app", "--run", "nowhere"), "Panel", "pip install 'moe_ablm[app]'")
    refused(main("app", "--run", "nowhere", "--port", "0"), "--port 0", "65,535")


@pytest.fixture
def run(tmp_path):
    save_model(tiny_model("topk"), tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.slow
def test_in_a_browser(run):
    """At a desktop's width and a phone's; ended by Ctrl-C."""
    pytest.importorskip("panel", reason="needs the extra `app`")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        refusal = run_command("moe_ablm", "app", "--run", run, "--port", port)
        refused(refusal, f"--port {port}", "in use", "another")
    argv, options = command("moe_ablm", "app", "--run", run, "--port", port)
    server = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    try:
        assert f"http://127.0.0.1:{port}" in server.stdout.readline()
        for width in (1280, 390):
            look_at(f"http://127.0.0.1:{port}/", width)
    finally:
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=60)
    assert server.returncode == 130 and "Traceback" not in errors


def look_at(url: str, width: int) -> None:
    with visiting(width) as (page, wrong):
        page.set_default_timeout(120_000)
        page.goto(url)
        page.get_by_role("button", name="Look").click()
        page.get_by_text("Numbered regions").wait_for()
        box = page.locator(".cdr", has_text="CDRH3")
        box.wait_for()
        assert "CDRH3 105-117" in box.inner_text()
        assert "SRWGGDGFYAMDY" in box.inner_text()
        page.locator("canvas").nth(2).wait_for(state="attached")
        page.get_by_role("button", name="Infill").click()
        page.get_by_text("log-probability").wait_for()
        page.get_by_label("Heavy chain").fill("EVQ1")
        page.get_by_role("button", name="Look").click()
        told = page.get_by_text("'1'")
        told.wait_for()
        beyond = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(beyond) <= 0
        if folder := os.environ.get("MOE_ABLM_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/app-{width}.png", full_page=True)
        assert not wrong
