"""TLS both ways: a planner that presents a certificate, and one that requires the client's."""

from __future__ import annotations

import datetime
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.client import CallError, Client
from hetis.v1 import cluster_service_pb2
from tests.planner.client.fake_planner import FakePlanner, serving


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A self-signed certificate of ``localhost``, which is its own authority, and its key."""
    key, certificate = _certificate()
    paths = {"cert": tmp_path / "cert.pem", "key": tmp_path / "key.pem"}
    paths["cert"].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths["key"].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


def _other_authority() -> bytes:
    return _certificate()[1].public_bytes(serialization.Encoding.PEM)


def _certificate() -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def test_a_planner_with_a_certificate_is_believed_if_its_authority_is(files: dict[str, Path]) -> None:
    pair = (files["key"].read_bytes(), files["cert"].read_bytes())
    with serving(FakePlanner(), credentials=grpc.ssl_server_credentials([pair])) as planner:
        with Client(planner.address, ca=files["cert"], token="secret") as client:
            client.clusters.ListClusters(cluster_service_pb2.ListClustersRequest())
        assert planner.metadata[0]["authorization"] == "Bearer secret"
        with Client(planner.address, plaintext=False) as stranger, pytest.raises(CallError) as caught:
            stranger.clusters.ListClusters(cluster_service_pb2.ListClustersRequest(), timeout=5)
        assert caught.value.is_unreachable


def test_a_client_shows_its_own_certificate_where_it_is_asked_for(files: dict[str, Path]) -> None:
    pair = (files["key"].read_bytes(), files["cert"].read_bytes())
    asking = grpc.ssl_server_credentials([pair], files["cert"].read_bytes(), require_client_auth=True)
    with serving(FakePlanner(), credentials=asking) as planner:
        with Client(planner.address, ca=files["cert"], cert=files["cert"], key=files["key"]) as client:
            client.clusters.ListClusters(cluster_service_pb2.ListClustersRequest())
        with Client(planner.address, ca=files["cert"]) as nobody, pytest.raises(CallError) as caught:
            nobody.clusters.ListClusters(cluster_service_pb2.ListClustersRequest(), timeout=5)
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
        other.write_bytes(_other_authority())
        assert run(["get", "clusters", "--server", address, "--ca", str(other)]) == ExitCode.UNREACHABLE
        assert "TLS failed: check that --ca is the CA" in " ".join(capsys.readouterr().err.split())
    with serving(FakePlanner()) as planner:
        address = planner.address.replace("localhost", "127.0.0.1")
        arguments = ["get", "clusters", "--server", address, "--ca", str(files["cert"])]
        assert run(arguments) == ExitCode.UNREACHABLE
        assert "TLS failed" in " ".join(capsys.readouterr().err.split())
    for credentials in ([], ["--ca", str(files["cert"])]):  # no planner listens any more
        assert run(["get", "clusters", "--server", address, *credentials]) == ExitCode.UNREACHABLE
        assert "is hetis-planner running?" in " ".join(capsys.readouterr().err.split())
