"""The real drivers of `s3://` and `gs://` with fakes that speak their protocols.

They need `pip install 'moe_ablm[stores]' 'moto[server]' gcp-storage-emulator`, and are skipped
without.
"""

import json
import logging
import shutil

import fsspec
import pytest
from test_mirror import begin, go_on, here

from moe_ablm import mirror as mirrors
from moe_ablm.errors import UserError
from moe_ablm.mirror import Mirror
from moe_ablm.store_copies import fetched
from moe_ablm.stores import LEASE, Store, StoreError, place_of


@pytest.fixture(scope="module")
def s3():
    """Starts an S3; what stops it."""
    s3fs = pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "id")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.register_implementation("s3", s3fs.S3FileSystem, clobber=True)
        fsspec.filesystem("s3", use_listings_cache=False).mkdir("bucket")
        yield server.stop
        server.stop()


@pytest.fixture(scope="module")
def gs():
    """Starts a Google Cloud Storage; what stops it."""
    pytest.importorskip("gcsfs")
    pytest.importorskip("gcp_storage_emulator")
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    port = server._api._httpd.socket.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        yield server.stop
        server.stop()


@pytest.fixture(params=["s3", "gs"])
def scheme(request, tmp_path, monkeypatch):
    request.getfixturevalue(request.param)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return request.param


def test_objects_come_and_go(scheme, tmp_path):
    store = Store(f"{scheme}://bucket/a/b", "--run")
    assert store.listing() == {} and store.read("x") is None
    (tmp_path / "large").write_bytes(bytes(range(256)) * 40_000)  # in several parts
    store.put(tmp_path / "large", "d/large")
    store.write("x", "1")
    Store(f"{scheme}://bucket/a/bc", "--run").write("", "another address")
    there = store.listing()
    assert {name: found.bytes for name, found in there.items()} == {"d/large": 10_240_000, "x": 1}
    store.write("x", "2")
    assert store.listing()["x"].version != there["x"].version
    assert store.listing()["d/large"] == there["d/large"]
    place = fetched(f"{scheme}://bucket/a/b", "--run")
    assert (place / "d/large").read_bytes() == (tmp_path / "large").read_bytes()
    assert fetched(f"{scheme}://bucket/a/b/x", "--run").read_text() == store.read("x") == "2"
    store.write("x", "3")
    assert (fetched(f"{scheme}://bucket/a/b", "--run") / "x").read_text() == "3"
    store.delete("x")
    store.delete("x")
    assert set(store.listing()) == {"d/large"}


def test_a_run_lives_in_the_store(scheme, tmp_path, monkeypatch):
    address = f"{scheme}://bucket/runs/r"

    def mirror():
        return Mirror(Store(address, "--workdir"), place_of("run", address))

    with mirror().open() as run:
        begin(run)
    with mirror().open() as run:
        go_on(run)
        run_here = here(run)
    shutil.rmtree(tmp_path / "cache")
    with mirror().open() as run:
        assert here(run) == run_here
    store = Store(address, "--workdir")
    assert set(store.listing()) == {*run_here, LEASE}
    assert json.loads(store.read(LEASE))["ended"] is True


def test_a_bucket_that_is_not_there_is_a_line(scheme):
    for use in (
        lambda store: store.listing(),
        lambda store: store.write("x", ""),
    ):
        with pytest.raises(StoreError) as found:
            use(Store(f"{scheme}://nobody-has-this/r", "--run"))
        assert str(found.value).startswith(f"--run {scheme}://nobody-has-this/r is not there (")


def test_no_credentials_is_a_line(s3, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    driver = fsspec.get_filesystem_class("s3")
    driver.clear_instance_cache()  # they keep credentials
    with pytest.raises(StoreError, match="access refused .*credentials"):
        Store("s3://bucket/r", "--run").write("x", "")
    driver.clear_instance_cache()


@pytest.mark.parametrize("name", ["s3", "gs"])
def test_a_network_that_goes_is_a_line_with_the_place_of_the_rest(
    name, request, tmp_path, monkeypatch
):
    stop = request.getfixturevalue(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(mirrors, "PATIENCE", 0)
    address = f"{name}://bucket/runs/other"
    mirror = Mirror(Store(address, "--workdir"), place_of("run", address))
    with pytest.raises(UserError, match="lacks the end of the run") as found, mirror.open() as run:
        begin(run)
        stop()
    assert str(run) in str(found.value) and "cannot be reached" in str(found.value)
