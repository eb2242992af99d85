"""TLS both ways: a planner that presents a certificate, and one that requires the client's."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.client import CallError, Client
from hetis.v1 import cluster_service_pb2
from tests.certificates import Authority, write
from tests.planner.client.fake_planner import FakePlanner, serving


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """An authority, and a certificate of ``localhost`` that it signed, with its key."""
    authority = Authority()
    certificate, key = write(tmp_path, authority.server())
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    return {"ca": tmp_path / "ca.pem", "cert": Path(certificate), "key": Path(key)}


def test_a_planner_with_a_certificate_is_believed_if_its_authority_is(files: dict[str, Path]) -> None:
    pair = (files["key"].read_bytes(), files["cert"].read_bytes())
    with serving(FakePlanner(), credentials=grpc.ssl_server_credentials([pair])) as planner:
        with Client(planner.address, ca=files["ca"], token="secret") as client:
            client.clusters.ListClusters(cluster_service_pb2.ListClustersRequest())
        assert planner.metadata[0]["authorization"] == "Bearer secret"
        with Client(planner.address, plaintext=False) as stranger, pytest.raises(CallError) as caught:
            stranger.clusters.ListClusters(cluster_service_pb2.ListClustersRequest(), timeout=5)
        assert caught.value.is_unreachable


def test_whoever_is_wrong_about_tls_is_told_so_first(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pair = (files["key"].read_bytes(), files["cert"].read_bytes())
    with serving(FakePlanner(), credentials=grpc.ssl_server_credentials([pair])) as planner:
        address = planner.address.replace("localhost", "127.0.0.1")  # one address: gRPC reports only the last failure
        assert run(["get", "clusters", "--server", address]) == ExitCode.UNREACHABLE
        assert "may require TLS: --ca FILE" in " ".join(capsys.readouterr().err.split())
        other = files["cert"].with_name("other.pem")
        other.write_bytes(Authority().pem)
        assert run(["get", "clusters", "--server", address, "--ca", str(other)]) == ExitCode.UNREACHABLE
        assert "TLS failed: check that --ca is the CA" in " ".join(capsys.readouterr().err.split())
    with serving(FakePlanner()) as planner:
        address = planner.address.replace("localhost", "127.0.0.1")
        arguments = ["get", "clusters", "--server", address, "--ca", str(files["ca"])]
        assert run(arguments) == ExitCode.UNREACHABLE
        assert "TLS failed" in " ".join(capsys.readouterr().err.split())
    for credentials in ([], ["--ca", str(files["ca"])]):  # no planner listens any more
        assert run(["get", "clusters", "--server", address, *credentials]) == ExitCode.UNREACHABLE
        assert "is hetis-planner running?" in " ".join(capsys.readouterr().err.split())
