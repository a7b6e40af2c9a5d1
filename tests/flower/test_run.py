"""`fedexec run` as a person calls it: real processes, the real network on the real digits."""

import functools
import http.server
import json
import os
import subprocess
import threading
import time

import numpy as np
import pytest

from fedexec.flower.grpc.address import free_address
from flower.commands import FEDEXEC, SMALL, succeed

pytestmark = pytest.mark.torch


@functools.cache
def small_run(backend, directory, learn="true"):
    file = directory / f"{backend}-{learn}.json"
    command = ["run", "--backend", backend, *SMALL, "--evaluate-clients", "2", "--quiet", "--json", str(file)]
    succeed(*command, FEDEXEC_LEARN=learn)
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.mark.thorough
def test_the_default_run_learns_the_digits_in_time(tmp_path):
    file = tmp_path / "run.json"
    started = time.monotonic()
    done = succeed("run", "--json", str(file), "--save", str(tmp_path / "weights.npz"))
    assert time.monotonic() - started < 180
    result = json.loads(file.read_text())
    assert [round_["server_round"] for round_ in result["rounds"]] == list(range(6))
    assert result["rounds"][0]["metrics"]["accuracy"] < 0.3
    assert result["rounds"][-1]["metrics"]["accuracy"] >= 0.90
    assert result["settings"]["sources"]["backend"] == "default"
    assert result["settings"]["data"]["name"] == "digits"
    assert result["stats"]["failed"] == 0
    assert len(result["tasks"]) == 1 + 6 + 50
    assert all(task["usage"]["peak_host_bytes"] > 0 for task in result["tasks"])
    assert "round 5/5" in done.stdout
    assert "; none failed" in done.stdout
    assert "Traceback" not in done.stderr
    with np.load(tmp_path / "weights.npz") as weights:
        assert sum(weights[name].size for name in weights) == 62006
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "weights.npz"]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("backend", "learn"),
    [("standby", "true"), ("standby", "false"), ("pool", "true"), ("loky", "true"), ("inline", "true")],
)
def test_every_backend_gives_the_same_bits_as_the_tutorials_way(backend, learn, directory):
    reference, other = small_run("process", directory), small_run(backend, directory, learn)
    assert other["settings"]["backend"] == backend
    assert other["weights_sha256"] == reference["weights_sha256"]
    for left, right in zip(reference["rounds"], other["rounds"], strict=True):
        assert left | {"seconds": 0} == right | {"seconds": 0}


@pytest.mark.thorough
def test_device_memory_falls_to_nothing_between_rounds(tmp_path):
    file = tmp_path / "run.json"
    done = succeed("run", *SMALL, "--device", "emulated:24GiB", "--json", str(file))
    assert "EMULATED GPU 0, 24.0 GiB, context 450 MiB: peak" in done.stdout.replace("\n", " ")
    result = json.loads(file.read_text())
    memory = result["memory"]
    assert memory["devices"]["EMULATED-0"]["peak_bytes"] >= 450 << 20
    marks = [(mark["label"], mark["server_round"]) for mark in memory["marks"]]
    assert marks == [("round", 0), ("round", 1), ("round", 2), ("shutdown", None)]
    assert [mark["device_bytes"]["EMULATED-0"] for mark in memory["marks"]] == [0, 0, 0, 0]
    for task in result["tasks"]:
        assert memory["began"] <= task["started"] <= task["ended"]
        if task["kind"] == "fit":
            assert task["usage"]["peak_device_bytes"] > 450 << 20


def test_only_the_sampled_clients_trained(directory):
    result = small_run("process", directory)
    for round_ in result["rounds"][1:]:
        assert len(round_["clients"]) == 3
        trained = [
            task["client"]
            for task in result["tasks"]
            if task["kind"] == "fit" and task["server_round"] == round_["server_round"]
        ]
        assert sorted(trained) == round_["clients"]


@pytest.mark.thorough
def test_the_environment_chooses(tmp_path):
    file = tmp_path / "run.json"
    tiny = ["--clients", "1", "--rounds", "1", "--epochs", "1", "--quiet", "--json", str(file)]
    done = succeed("run", *tiny, FEDEXEC_BACKEND="inline", FEDEXEC_LOG_LEVEL="DEBUG", API_TOKEN="hunter2")
    assert "hunter2" not in done.stdout + done.stderr + file.read_text(), "what else it holds is private"
    settings = json.loads(file.read_text())["settings"]
    assert (settings["backend"], settings["sources"]["backend"]) == ("inline", "FEDEXEC_BACKEND")


@pytest.mark.timeout(600)  # two federations, the first of which imports torch in every process anew
@pytest.mark.thorough
def test_one_process_per_client_as_in_the_tutorial_gives_the_same_bits(tmp_path):
    results = []
    for how in (("--processes",), ("--backend", "inline")):
        file = tmp_path / f"{how[-1]}.json"
        succeed(
            "run", *how, *SMALL, "--clients", "2", "--fit-clients", "2", "--evaluate-clients", "1",
            "--quiet", "--json", str(file),
        )  # fmt: skip
        results.append(json.loads(file.read_text()))
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
    assert [sum(task["kind"] == "fit" for task in result["tasks"]) for result in results] == [4, 4]


@pytest.mark.thorough
def test_server_and_clients_run_apart_by_tls_and_a_secret(tmp_path, directory):
    certificates, secret, guess = _write_certificates(tmp_path), tmp_path / "secret", tmp_path / "guess"
    secret.write_bytes(os.urandom(32))
    guess.write_bytes(os.urandom(32))
    address = free_address("localhost")
    file = tmp_path / "server.json"
    hosts = [
        subprocess.Popen(
            [
                *FEDEXEC, "client", "--address", address, "--clients", "5", "--threads-per-worker", "1",
                "--root-certificates", certificates[0], "--client-secret", str(known), *share,
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        for known, share in ((guess, ["--host", "1"]), (secret, ["--host", "2"]), (secret, ["--first", "2"]))
    ]  # fmt: skip
    succeed(
        "server", "--address", address, *SMALL, "--evaluate-clients", "2", "--quiet", "--json", str(file),
        "--certificates", *certificates, "--client-secret", str(secret),
    )  # fmt: skip
    told = [host.communicate(timeout=30)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [1, 0, 0]
    assert told[0].splitlines() == [
        "fedexec: error: The server refused a client of this machine: give both the same --client-secret."
    ]
    assert json.loads(file.read_text())["weights_sha256"] == small_run("process", directory)["weights_sha256"]


@pytest.mark.thorough
def test_a_proxy_in_the_environment_is_not_asked():
    asked = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_CONNECT(self):
            asked.append(self.path)
            self.send_error(502)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    proxy = f"http://127.0.0.1:{server.server_port}"
    try:
        succeed(
            "run", "--clients", "1", "--rounds", "1", "--epochs", "1", "--backend", "inline",
            http_proxy=proxy, https_proxy=proxy, grpc_proxy=proxy, no_proxy="example.org",
        )  # fmt: skip
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert asked == []


@pytest.mark.thorough
def test_tls_is_passed_to_flower(tmp_path):
    names = _write_certificates(tmp_path)
    file = tmp_path / "run.json"
    succeed(
        "run", "--certificates", *names, "--address", free_address("localhost"), "--backend", "inline",
        "--clients", "2", "--rounds", "1", "--epochs", "1", "--quiet", "--json", str(file),
    )  # fmt: skip
    assert len(json.loads(file.read_text())["rounds"][1]["clients"]) == 2


def _write_certificates(directory):
    """Make a CA and a server certificate for localhost; return the three files' names."""
    import datetime as dt

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = dt.datetime.now(dt.UTC)

    def certificate(name, key, issuer, issuer_key, *extensions):
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(hours=1))
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    contents = {
        "ca.pem": certificate(
            "test CA", ca_key, "test CA", ca_key, x509.BasicConstraints(ca=True, path_length=None)
        ),
        "server.pem": certificate(
            "localhost", key, "test CA", ca_key, x509.SubjectAlternativeName([x509.DNSName("localhost")])
        ),
        "server.key": key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    }
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    return [str(directory / name) for name in contents]
