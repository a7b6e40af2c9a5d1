"""Files with secrets: who else can read them, what could be guessed, and what has no end."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs flwr: pip install 'fedexec[flower]'")

from fedexec._cli import main
from fedexec._cli.options import UsageError
from fedexec._cli.secret import read_key, read_secret


@pytest.fixture
def public():
    """A directory that everybody can enter."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def secret(directory, content=None, mode=0o600):
    made = directory / "secret"
    made.write_bytes(os.urandom(32) if content is None else content)
    made.chmod(mode)
    return made


@pytest.mark.parametrize("read", [read_secret, read_key])
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_file_that_others_can_read_is_named(public, caplog, read, mode):
    file = secret(public, mode=mode)
    assert read(str(file)) == file.read_bytes()
    (message,) = caplog.messages
    assert message == f"{file} can be read by others on this machine: chmod 600 {file}"


def test_a_file_that_nobody_else_can_reach_is_not(public, caplog):
    read_secret(str(secret(public)))
    public.chmod(0o700)
    read_secret(str(secret(public, mode=0o644)))
    assert not caplog.messages


@pytest.mark.parametrize("content", [bytes(32), b"a" * 1000, b"passwordpassword", b"0" * 31 + b"\n"])
def test_what_can_be_guessed_is_refused(tmp_path, content):
    file = secret(tmp_path, content)
    with pytest.raises(UsageError, match=f"--client-secret {file}: it repeats itself.*urandom"):
        read_secret(str(file))


@pytest.mark.parametrize("make", [lambda: os.urandom(16), lambda: os.urandom(16).hex().encode()])
def test_no_random_secret_is_taken_for_one_that_can_be_guessed(tmp_path, make):
    for _ in range(1000):
        read_secret(str(secret(tmp_path, make())))


@pytest.mark.parametrize("option", ["--client-secret", "--root-certificates"])
@pytest.mark.parametrize("device", ["/dev/zero", "/dev/urandom"])
def test_a_device_is_not_read_for_ever(capsys, option, device):
    assert main(["client", option, device]) == 2
    assert f"{option} {device}: it is larger than 1 MiB" in capsys.readouterr().err


def test_a_standard_input_without_end_is_not_read_for_ever():
    command = [sys.executable, "-m", "fedexec", "client", "--client-secret", "-"]
    with Path("/dev/zero").open("rb") as zeros:
        done = subprocess.run(command, stdin=zeros, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("fedexec: error: --client-secret -: it is larger than 1 MiB")


def test_a_pipe_is_read(tmp_path):
    reading, writing = os.pipe()
    expected = os.urandom(32)
    os.write(writing, expected)
    os.close(writing)
    try:
        assert read_secret(f"/dev/fd/{reading}") == expected
    finally:
        os.close(reading)


@pytest.mark.parametrize("command", ["run", "server", "client"])
def test_the_help_says_what_a_secret_does_not_do(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "Without TLS it does not stop who relays or changes what both send" in told


# ---------------------------------------------------------------- TLS


@pytest.fixture
def pem(tmp_path):
    """Return the names of three sound files: a CA, and the certificate and key of a server."""
    pytest.importorskip("cryptography", reason="makes certificates")
    from flower.test_run import _write_certificates

    return _write_certificates(tmp_path)


GARBAGE = b"\x00\xff garbage"
HOLLOW = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
HOLLOW_KEY = b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    ("which", "content", "says"),
    [
        (0, GARBAGE, "ca.pem holds no certificate"),
        (0, b"", "ca.pem holds no certificate"),
        (1, HOLLOW, "server.pem holds no certificate"),
        (2, GARBAGE, "server.key holds no private key"),
        (2, HOLLOW_KEY, "server.key holds no private key that can be read"),
    ],
)
@pytest.mark.parametrize("command", ["run", "server"])
def test_certificates_with_garbage_are_named_at_the_start(capsys, pem, command, which, content, says):
    Path(pem[which]).write_bytes(content)
    assert main([command, "--certificates", *pem]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fedexec: error: --certificates ") and says in line


def test_a_key_of_another_certificate_or_with_a_passphrase_is_told(capsys, pem):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    other = ec.generate_private_key(ec.SECP256R1())
    for encryption, says in (
        (serialization.NoEncryption(), "server.key is not the key of the certificate in "),
        (serialization.BestAvailableEncryption(b"secret"), "server.key is encrypted with a passphrase"),
    ):
        form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
        Path(pem[2]).write_bytes(other.private_bytes(*form))
        assert main(["server", "--certificates", *pem]) == 2
        assert says in capsys.readouterr().err


def test_a_root_certificate_with_garbage_is_named(capsys, tmp_path):
    (tmp_path / "ca.pem").write_bytes(GARBAGE)
    assert main(["client", "--root-certificates", str(tmp_path / "ca.pem")]) == 2
    assert f"--root-certificates {tmp_path}/ca.pem holds no certificate" in capsys.readouterr().err
