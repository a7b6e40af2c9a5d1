"""Clients that know the secret, and answer what they should not."""

import contextlib
import io
import pickle
import threading

import grpc
import numpy as np
import pytest
from flwr.common import parameters_to_ndarrays
from flwr.proto.transport_pb2 import ClientMessage, Scalar

import fedexec
from fedexec.flower.proof import prove
from flower.test_strangers import SECRET, Stranger, members, run


def _bytes(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


RIGHT = [np.ones((3, 2), np.float32), np.ones(4, np.float32)]
HUGE = _bytes(RIGHT[0]).replace(b"(3, 2), }", b"(1000000000000,), }")
FITS = {
    "no arrays": {"tensors": []},
    "garbage": {"tensors": [b"garbage", b""]},
    "a pickle": {"tensors": [pickle.dumps(RIGHT[0]), pickle.dumps(RIGHT[1])]},
    "a header of terabytes": {"tensors": [HUGE, _bytes(RIGHT[1])]},
    "integers": {"arrays": [array.astype(np.int64) for array in RIGHT]},
    "truth values": {"arrays": [array > 0 for array in RIGHT]},
    "more digits": {"arrays": [array + np.float64(1e-12) for array in RIGHT]},
    "complex": {"arrays": [array.astype(complex) for array in RIGHT]},
    "text": {"arrays": [array.astype(str) for array in RIGHT]},
    "records": {"arrays": [np.zeros(array.shape, [("a", "f4")]) for array in RIGHT]},
    "dates": {"arrays": [array.astype("M8[s]") for array in RIGHT]},
    "not a number": {"arrays": [RIGHT[0], RIGHT[1] * np.nan]},
    "infinite": {"arrays": [RIGHT[0], RIGHT[1] * np.inf]},
    "another shape": {"arrays": [RIGHT[0].T, RIGHT[1]]},
    "a layer more": {"arrays": [*RIGHT, RIGHT[1]]},
    "no samples": {"samples": 0},
    "minus a sample": {"samples": -1},
    "an unknown status": {"code": 99, "tensors": [b""]},
    "too much": {"arrays": [np.zeros(1 << 21, np.float32), RIGHT[1]]},
    "the answer to another question": None,
    "nothing": ClientMessage(),
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
        self._index, self._fit, self._evaluation = index, fit, evaluation
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
                self.stranger.send(self._fit if isinstance(self._fit, ClientMessage) else self._trained())
            case "evaluate_ins":
                given = {"loss": 1.0, "samples": 5, "metrics": {"accuracy": Scalar(double=0.5)}}
                given |= self._evaluation
                answer = ClientMessage.EvaluateRes(loss=given["loss"], num_examples=given["samples"])
                for name, value in given["metrics"].items():
                    answer.metrics[name].CopyFrom(value)
                self.stranger.send(ClientMessage(evaluate_res=answer))
            case _:
                self.stranger.close()

    def _trained(self):
        if self._fit is None:
            return ClientMessage(get_properties_res=ClientMessage.GetPropertiesRes())
        given = {"samples": 5, "code": 0, "arrays": RIGHT} | self._fit
        answer = ClientMessage.FitRes(num_examples=given["samples"])
        answer.status.code = given["code"]
        answer.parameters.tensor_type = "numpy.ndarray"
        answer.parameters.tensors.extend(given.get("tensors") or map(_bytes, given["arrays"]))
        if given.get("tensors") == []:
            del answer.parameters.tensors[:]
        return ClientMessage(fit_res=answer)


@pytest.mark.parametrize("evaluate", [False, True])
def test_with_twenty_kinds_of_hostile_clients_a_run_ends_with_the_weights_of_the_honest(evaluate):
    averages, honest = [], range(len(FITS), 50)  # they are the majority
    for kinds in (list(FITS.values()), []):
        hostile = []

        def start(address, kinds=kinds, hostile=hostile):
            for index, kind in enumerate(kinds):
                evaluation = EVALUATIONS[index % len(EVALUATIONS)]
                hostile.append(Hostile(address, index, kind, evaluation))
            members(executor, address, honest).start()

        with fedexec.create_executor("inline") as executor:
            strategy = run(
                start,
                clients=len(kinds) + len(honest),
                numbers=50,
                evaluate_clients=50 if evaluate else 0,
            )
        averages.append(parameters_to_ndarrays(strategy.parameters))
        for each in hostile:
            each.stranger.close()
        current = strategy.rounds[1]
        assert {row["client"] for row in current.failures} >= set(range(len(kinds)))
        assert all(row["client"] < len(kinds) for row in current.failures)
        assert current.client_metrics == ({"accuracy": 0.5} if evaluate else {})
    for left, right in zip(*averages, strict=True):
        np.testing.assert_array_equal(left, right)
