"""Clients that prove that they belong here: each answers a challenge with a secret shared with the server.

Flower's ``start_server`` lets in whoever connects. TLS tells a client who the server is; this tells the
server who the client is. The secret itself never travels.
"""

import hashlib
import hmac
import logging
import secrets
import threading

from flwr.common import GetPropertiesIns, ReconnectIns, Scalar
from flwr.server import SimpleClientManager
from flwr.server.client_proxy import ClientProxy

from fedexec.errors import FedexecError

__all__ = ["MIN_SECRET_BYTES", "ProvenClients", "RefusedError", "prove"]

log = logging.getLogger("fedexec.flower")

MIN_SECRET_BYTES = 16
CHALLENGE, PROOF, REFUSED = "challenge", "proof", "refused"  # names of Flower properties
PATIENCE = 60.0  # seconds for an answer


class RefusedError(FedexecError, ConnectionError):
    """The server let a client not take part: it knows another secret, or none."""

    def __str__(self) -> str:
        return "The server refused a client of this machine: give both the same --client-secret."


def prove(secret: bytes, challenge: str) -> str:
    """Answer a challenge: HMAC-SHA256 of it (RFC 2104), as hexadecimal digits."""
    return hmac.new(secret, b"fedexec client " + challenge.encode(), hashlib.sha256).hexdigest()


class ProvenClients(SimpleClientManager):
    """Knows those clients only that have answered its challenge; others are told so, and sent away.

    Parameters
    ----------
    secret : bytes
    """

    def __init__(self, secret: bytes) -> None:
        super().__init__()
        self._secret = secret
        self._admission = threading.Lock()  # guards the next
        self._connected: dict[str, ClientProxy] = {}  # cid -> one that may be asked still

    def register(self, client: ClientProxy) -> bool:
        """Let it connect, and ask it meanwhile: Flower passes questions on when this has returned."""
        with self._admission:
            self._connected[client.cid] = client
        threading.Thread(target=self._admit, args=(client,), name="fedexec-admit", daemon=True).start()
        return True

    def unregister(self, client: ClientProxy) -> None:
        """Forget a client whose connection has ended."""
        with self._admission:
            self._connected.pop(client.cid, None)
            super().unregister(client)

    def _admit(self, client: ClientProxy) -> None:
        challenge = secrets.token_hex(32)
        try:
            answer = _ask(client, {CHALLENGE: challenge}).get(PROOF)
            if isinstance(answer, str) and hmac.compare_digest(
                answer.encode(), prove(self._secret, challenge).encode()
            ):
                with self._admission:
                    if client.cid in self._connected:
                        super().register(client)
                return
            log.warning("a client was refused: it does not know the secret")
            _ask(client, {REFUSED: True})
            client.reconnect(ReconnectIns(seconds=None), timeout=PATIENCE, group_id=None)
        except Exception as exc:  # lost meanwhile
            log.debug("a client left before it was admitted", exc_info=exc)


def _ask(client: ClientProxy, config: dict[str, Scalar]) -> dict[str, Scalar]:
    answer = client.get_properties(GetPropertiesIns(config), timeout=PATIENCE, group_id=None)
    return answer.properties
