"""Client authentication: each client answers a challenge with a secret that it shares with the server.

Flower's ``start_server`` admits every client that connects. TLS authenticates the server to the client; this
module authenticates the client to the server. The secret itself is never sent.
"""

import functools
import hashlib
import hmac
import logging
import secrets
import threading

from flwr.common import GetPropertiesIns, ReconnectIns, Scalar
from flwr.server import SimpleClientManager
from flwr.server.client_proxy import ClientProxy

from fedexec.errors import FedexecError

__all__ = ["MIN_SECRET_BYTES", "ROOM", "STRANGERS", "AdmittedClients", "RefusedError", "prove"]

log = logging.getLogger("fedexec.flower")

MIN_SECRET_BYTES = 16
CHALLENGE, PROOF, REFUSED = "challenge", "proof", "refused"  # names of Flower properties
PATIENCE = 60.0  # time limit in seconds for an answer
STRANGERS = 64  # number of connected clients that may wait for admission


# Reasons for a refusal, as the server sends them.
SECRET, NUMBER, TAKEN, ROOM = "secret", "number", "taken", "room"
_REASONS = {
    SECRET: "The server refused a client of this machine: give both the same --client-secret.",
    NUMBER: "The server refused {client} of this machine: its number is not valid. Give both the same "
    "--clients, and see --first and --host.",
    TAKEN: "The server refused {client} of this machine: another client has its number. Give each machine "
    "clients of its own: see --first and --host.",
    ROOM: "The server has no room for a client of this machine, and had none later on.",
}


class RefusedError(FedexecError, ConnectionError):
    """The server has refused a client.

    Parameters
    ----------
    why : str
        ``secret``: the client knows no secret or a different one. ``number``: its number is not valid.
        ``taken``: another client has its number. ``room``: the server has no room.
    client : int or None
        The client's number.
    """

    def __init__(self, why: str = SECRET, client: int | None = None) -> None:
        super().__init__(why, client)
        self.why, self.client = why, client

    def __str__(self) -> str:
        name = "a client" if self.client is None else f"client {self.client}"
        return _REASONS.get(self.why, _REASONS[SECRET]).format(client=name)


def prove(secret: bytes, challenge: str) -> str:
    """Answer a challenge with its HMAC-SHA256 (RFC 2104).

    Parameters
    ----------
    secret : bytes
    challenge : str

    Returns
    -------
    str
        Hexadecimal digits.
    """
    return hmac.new(secret, b"fedexec client " + challenge.encode(), hashlib.sha256).hexdigest()


class AdmittedClients(SimpleClientManager):
    """Manages clients that have answered its challenge; others are told the reason and disconnected.

    A client that has not answered occupies one of a few places. If all of them are occupied, the next client
    takes over the oldest place, so clients that never answer cannot keep others out.

    Parameters
    ----------
    secret : bytes, optional
        Clients that do not know it are refused.
    numbers : int, optional
        Clients whose number is not below this one are refused.
    room : int
        How many clients may take part at once.
    """

    def __init__(self, secret: bytes | None = None, *, numbers: int | None = None, room: int = 1000) -> None:
        super().__init__()
        self._secret = secret
        self._numbers = numbers
        self._room = room
        self._admission = threading.Lock()  # guards the next attribute and the clients
        # cid -> client that may still be asked, the oldest first
        self._strangers: dict[str, ClientProxy] = {}

    def register(self, client: ClientProxy) -> bool:
        """Accept a connection, and challenge the client in a thread, as Flower can ask only afterwards.

        Parameters
        ----------
        client : ClientProxy

        Returns
        -------
        bool
            Always True.
        """
        client.bridge.forget = functools.partial(self.unregister, client)  # type: ignore[attr-defined]
        with self._admission:
            self._strangers[client.cid] = client
            first = next(iter(self._strangers)) if len(self._strangers) > STRANGERS else None
            evicted = None if first is None else self._strangers.pop(first)
        if evicted is not None:
            log.debug("a client that has not answered makes room for another")
            evicted.bridge.end()  # type: ignore[attr-defined]
        threading.Thread(target=self._admit, args=(client,), name="fedexec-admit", daemon=True).start()
        return True

    def unregister(self, client: ClientProxy) -> None:
        """Forget a client whose connection has ended.

        Parameters
        ----------
        client : ClientProxy
        """
        with self._admission:
            self._strangers.pop(client.cid, None)
            was_there = client.cid in self.clients
            super().unregister(client)
        if was_there:
            log.debug("%s takes part no more", _called(client))

    def all(self) -> dict[str, ClientProxy]:
        """Return the clients that take part.

        Returns
        -------
        dict of str to ClientProxy
            cid -> client.
        """
        with self._admission:
            return dict(self.clients)

    def _admit(self, client: ClientProxy) -> None:
        challenge = secrets.token_hex(32)
        try:
            answer = _ask(client, {CHALLENGE: challenge})
            refusal = self._judge(client, challenge, answer)
            if refusal is None:
                return
            why, reason = refusal
            log.warning("a client was refused: %s", reason)
            _ask(client, {REFUSED: why})
            client.reconnect(ReconnectIns(seconds=None), timeout=PATIENCE, group_id=None)
        except Exception as exc:  # The connection was lost meanwhile.
            log.debug("a client left before it was admitted", exc_info=exc)

    def _judge(
        self, client: ClientProxy, challenge: str, answer: dict[str, Scalar]
    ) -> tuple[str, str] | None:
        """Admit the client, or return why not: the code for the client, and the text for the log."""
        proof, index = answer.get(PROOF), answer.get("client")
        if self._secret is not None and not (
            isinstance(proof, str)
            and hmac.compare_digest(proof.encode(), prove(self._secret, challenge).encode())
        ):
            return SECRET, "it does not know the secret"
        if index is not None:
            if not isinstance(index, int) or isinstance(index, bool) or index < 0:
                return NUMBER, f"{index!r:.40} is not a valid client number"
            if self._numbers is not None and index >= self._numbers:
                return NUMBER, f"its number {index} is not among 0 to {self._numbers - 1}"
        with self._admission:
            if client.cid not in self._strangers:
                return None  # The client has left.
            others = self.clients.values()
            if index is not None and any(other.properties["client"] == index for other in others):
                return TAKEN, f"client {index} is connected already"
            if len(self.clients) >= self._room:
                return ROOM, f"{self._room} clients take part already"
            del self._strangers[client.cid]
            # Flower caches properties here and does not ask again.
            client.properties = {"client": "" if index is None else index}
            client.bridge.is_admitted = True  # type: ignore[attr-defined]
            super().register(client)
        log.debug("%s takes part", _called(client))
        return None


def _called(client: ClientProxy) -> str:
    number = client.properties["client"]
    return f"client {number}" if isinstance(number, int) else "a client without a number"


def _ask(client: ClientProxy, config: dict[str, Scalar]) -> dict[str, Scalar]:
    answer = client.get_properties(GetPropertiesIns(config), timeout=PATIENCE, group_id=None)
    return answer.properties
