"""Clients that know the secret, and answer what they should not."""

import contextlib
import io
import json
import pickle
import subprocess
import threading
from typing import Any

import grpc
import numpy as np
import pytest
from flwr.common import parameters_to_ndarrays
from flwr.proto.transport_pb2 import ClientMessage, Scalar

import fedexec
from fedexec.flower.grpc.address import free_address
from fedexec.flower.grpc.client_auth import prove
from fedexec.testing.tasks import DEADLINE
from flower.commands import FEDEXEC
from flower.test_strangers import SECRET, Stranger, members, run


def _bytes(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _of_terabytes(array):
    wrong = _bytes(array).replace(f"{array.shape}, }}".encode(), b"(1000000000000,), }")
    assert wrong != _bytes(array)
    return wrong


FITS = {  # what is answered -> how it follows from the model that was asked about
    "no arrays": lambda model: {"tensors": []},
    "garbage": lambda model: {"tensors": [b"garbage", b""]},
    "a pickle": lambda model: {"tensors": [pickle.dumps(array) for array in model]},
    "a header of terabytes": lambda model: {"tensors": [_of_terabytes(model[0]), *map(_bytes, model[1:])]},
    "integers": lambda model: {"arrays": [array.astype(np.int64) for array in model]},
    "truth values": lambda model: {"arrays": [array > 0 for array in model]},
    "more digits": lambda model: {"arrays": [array + np.float64(1e-12) for array in model]},
    "complex": lambda model: {"arrays": [array.astype(complex) for array in model]},
    "text": lambda model: {"arrays": [array.astype(str) for array in model]},
    "records": lambda model: {"arrays": [np.zeros(array.shape, [("a", "f4")]) for array in model]},
    "dates": lambda model: {"arrays": [array.astype("i8").astype("M8[s]") for array in model]},
    "not a number": lambda model: {"arrays": [*model[:-1], model[-1] * np.nan]},
    "infinite": lambda model: {"arrays": [*model[:-1], model[-1] + np.inf]},
    "another shape": lambda model: {"arrays": [model[0][..., None], *model[1:]]},
    "a layer more": lambda model: {"arrays": [*model, model[-1]]},
    "no samples": lambda model: {"samples": 0},
    "minus a sample": lambda model: {"samples": -1},
    "an unknown status": lambda model: {"code": 99, "tensors": [b""]},
    "too much": lambda model: {"arrays": [np.zeros(1 << 23, np.float32), *model[1:]]},
    "the answer to another question": lambda model: None,
    "nothing": lambda model: ClientMessage(),
}
EVALUATIONS = [
    {"loss": float("nan")},
    {"loss": float("inf")},
    {"samples": 0},
    {"samples": -5},
    {"metrics": {}},
    {"metrics": {"accuracy": Scalar(string="high")}},
    {"metrics": {"accuracy": Scalar(bytes=b"high")}},
    {"metrics": {"accuracy": Scalar(double=float("nan"))}},
    {"metrics": {"accuracy": Scalar()}},
]


class Hostile(threading.Thread):
    """A client that takes part and answers what it should not, once it is asked to train or to evaluate."""

    def __init__(self, address, index, fit, evaluation):
        super().__init__(daemon=True)
        self.stranger = Stranger(address)
        self._index, self._answer_fit, self._evaluation = index, fit, evaluation
        self.start()

    def run(self):
        with contextlib.suppress(grpc.RpcError):
            for message in self.stranger.hears:
                self._answer(message)

    def _answer(self, message):
        match message.WhichOneof("msg"):
            case "get_properties_ins":
                challenge = message.get_properties_ins.config["challenge"].string
                self.stranger.say(client=self._index, proof=prove(SECRET, challenge))
            case "fit_ins":
                tensors = message.fit_ins.parameters.tensors
                self.stranger.send(self._trained([np.load(io.BytesIO(tensor)) for tensor in tensors]))
            case "evaluate_ins":
                given: dict[str, Any] = {
                    "loss": 1.0,
                    "samples": 5,
                    "metrics": {"accuracy": Scalar(double=0.5)},
                }
                given |= self._evaluation
                answer = ClientMessage.EvaluateRes(loss=given["loss"], num_examples=given["samples"])
                for name, value in given["metrics"].items():
                    answer.metrics[name].CopyFrom(value)
                self.stranger.send(ClientMessage(evaluate_res=answer))
            case _:
                self.stranger.close()

    def _trained(self, model):
        given = self._answer_fit(model)
        if given is None:
            return ClientMessage(get_properties_res=ClientMessage.GetPropertiesRes())
        if isinstance(given, ClientMessage):
            return given
        given = {"samples": 5, "code": 0, "arrays": model} | given
        answer = ClientMessage.FitRes(num_examples=given["samples"])
        answer.status.code = given["code"]
        answer.parameters.tensor_type = "numpy.ndarray"
        tensors = given["tensors"] if "tensors" in given else map(_bytes, given["arrays"])
        answer.parameters.tensors.extend(tensors)
        return ClientMessage(fit_res=answer)


def hostile_clients(address, number):
    """Start clients of the first so many kinds, numbered from 0."""
    return [
        Hostile(address, index, fit, EVALUATIONS[index % len(EVALUATIONS)])
        for index, fit in enumerate([*FITS.values()][:number])
    ]


HONEST = range(len(FITS), 50)  # they are the majority


@pytest.mark.thorough_but("True")
@pytest.mark.parametrize("evaluate", [False, True])
def test_with_twenty_kinds_of_hostile_clients_a_server_ends_with_the_weights_of_the_honest(evaluate):
    averages = []
    for number in (len(FITS), 0):
        hostile: list[Hostile] = []

        def start(address, number=number, hostile=hostile):
            hostile += hostile_clients(address, number)
            members(executor, address, HONEST).start()

        with fedexec.create_executor("inline") as executor:
            strategy = run(
                start,
                clients=number + len(HONEST),
                numbers=50,
                evaluate_clients=50 if evaluate else 0,
            )
        averages.append(parameters_to_ndarrays(strategy.parameters))
        for each in hostile:
            each.stranger.close()
        current = strategy.rounds[1]
        assert {row["client"] for row in current.failures} >= set(range(number))
        assert all(row["client"] < number for row in current.failures)
        assert current.client_metrics == ({"accuracy": 0.5} if evaluate else {})
    for left, right in zip(*averages, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.thorough
@pytest.mark.parametrize("evaluate", [False, True])
def test_so_does_the_command(evaluate, tmp_path):
    pytest.importorskip("torch", reason="needs torch: pip install 'fedexec[demo]'")
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    secret.chmod(0o600)
    clients = ["--clients", "50", "--client-secret", secret, "--threads-per-worker", "1"]
    weights = []
    for number in (len(FITS), 0):
        address, saved, report = free_address(), tmp_path / f"{number}.npz", tmp_path / f"{number}.json"
        server = [
            *FEDEXEC, "server", "--address", address, *clients, "--rounds", "1", "--epochs", "1",
            "--available-clients", str(number + len(HONEST)),
            "--evaluate-clients", "50" if evaluate else "0", "--save", saved, "--json", report,
        ]  # fmt: skip
        host = [
            *FEDEXEC, "client", "--address", address, *clients,
            "--first", str(HONEST.start), "--host", str(len(HONEST)),
        ]  # fmt: skip
        with (
            subprocess.Popen(server, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as serving,
            contextlib.ExitStack() as stack,
        ):
            stack.callback(serving.kill)  # if anything goes wrong
            hostile = hostile_clients(address, number)
            subprocess.run(host, stdout=subprocess.DEVNULL, check=True, timeout=DEADLINE * 4)
            _, told = serving.communicate(timeout=DEADLINE)
            assert serving.returncode == 0, told.decode()
        for each in hostile:
            each.stranger.close()
        with np.load(saved) as arrays:
            weights.append([arrays[name] for name in arrays.files])
        current = json.loads(report.read_text())["rounds"][1]
        assert {row["client"] for row in current["failures"]} >= set(range(number))
        assert all(row["client"] < number for row in current["failures"])
    for left, right in zip(*weights, strict=True):
        np.testing.assert_array_equal(left, right)
