"""Clients that prove that they belong here: each answers a challenge with a secret shared with the server.

Flower's ``start_server`` lets in whoever connects. TLS tells a client who the server is; this tells the
server who the client is. The secret itself never travels.
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
PATIENCE = 60.0  # seconds for an answer
STRANGERS = 64  # how many may be connected that have not been admitted


SECRET, NUMBER, ROOM = "secret", "number", "room"  # why somebody is refused, as the server tells it
_REASONS = {
    SECRET: "The server refused a client of this machine: give both the same --client-secret.",
    NUMBER: "The server refused a client of this machine: its number is not among those that there are, "
    "or another client has it: see --clients, --first and --host.",
    ROOM: "The server has no room for a client of this machine, and had none later on.",
}


class RefusedError(FedexecError, ConnectionError):
    """The server let a client not take part.

    Parameters
    ----------
    why : str
        ``secret``: it knows another, or none; ``number``: it has none that is free; ``room``.
    """

    def __init__(self, why: str = SECRET) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return _REASONS.get(self.why, _REASONS[SECRET])


def prove(secret: bytes, challenge: str) -> str:
    """Answer a challenge: HMAC-SHA256 of it (RFC 2104), as hexadecimal digits."""
    return hmac.new(secret, b"fedexec client " + challenge.encode(), hashlib.sha256).hexdigest()


class AdmittedClients(SimpleClientManager):
    """Knows those clients only that have answered its first question; others are told so, and sent away.

    Who has not answered yet has one of a few places, which the next one takes over if there are no others: so
    those who never answer keep nobody out.

    Parameters
    ----------
    secret : bytes, optional
        Who does not know it is refused.
    numbers : int, optional
        So is who has a number that is not below this.
    room : int
        How many may take part at once.
    """

    def __init__(self, secret: bytes | None = None, *, numbers: int | None = None, room: int = 1000) -> None:
        super().__init__()
        self._secret = secret
        self._numbers = numbers
        self._room = room
        self._admission = threading.Lock()  # guards the next, and the clients
        self._strangers: dict[str, ClientProxy] = {}  # cid -> one that may be asked still, the first first

    def register(self, client: ClientProxy) -> bool:
        """Let it connect, and ask it meanwhile: Flower passes questions on when this has returned."""
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
        """Forget a client whose connection has ended."""
        with self._admission:
            self._strangers.pop(client.cid, None)
            was_there = client.cid in self.clients
            super().unregister(client)
        if was_there:
            log.debug("%s takes part no more", _called(client))

    def all(self) -> dict[str, ClientProxy]:
        """Return those that take part."""
        with self._admission:
            return dict(self.clients)

    def _admit(self, client: ClientProxy) -> None:
        challenge = secrets.token_hex(32)
        try:
            answer = _ask(client, {CHALLENGE: challenge})
            refusal = self._judge(client, challenge, answer)
            if refusal is None:
                return
            why, told = refusal
            log.warning("a client was refused: %s", told)
            _ask(client, {REFUSED: why})
            client.reconnect(ReconnectIns(seconds=None), timeout=PATIENCE, group_id=None)
        except Exception as exc:  # lost meanwhile
            log.debug("a client left before it was admitted", exc_info=exc)

    def _judge(
        self, client: ClientProxy, challenge: str, answer: dict[str, Scalar]
    ) -> tuple[str, str] | None:
        """Let it take part, or return why not: for the client, and for the log."""
        proof, index = answer.get(PROOF), answer.get("client")
        if self._secret is not None and not (
            isinstance(proof, str)
            and hmac.compare_digest(proof.encode(), prove(self._secret, challenge).encode())
        ):
            return SECRET, "it does not know the secret"
        if index is not None:
            if not isinstance(index, int) or isinstance(index, bool) or index < 0:
                return NUMBER, f"{index!r:.40} is no client's number"
            if self._numbers is not None and index >= self._numbers:
                return NUMBER, f"its number {index} is not among 0 to {self._numbers - 1}"
        with self._admission:
            if client.cid not in self._strangers:
                return None  # it has left
            others = self.clients.values()
            if index is not None and any(other.properties["client"] == index for other in others):
                return NUMBER, f"there is a client {index} already"
            if len(self.clients) >= self._room:
                return ROOM, f"there are {self._room} already"
            del self._strangers[client.cid]
            client.properties = {"client": "" if index is None else index}  # what is asked is asked once
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
