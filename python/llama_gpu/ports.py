"""Free TCP ports for servers."""

from __future__ import annotations

import socket

__all__ = ["Ports"]

LAST_PORT = 65535


class Ports:
    """Hands out ports that nobody listens on.

    With ``first``, the lowest free ones from there on; without, whichever the system gives. A port that is
    out is not given again, although its server may not listen yet: two loads at once would get the same.
    """

    def __init__(self, host: str = "127.0.0.1", first: int | None = None) -> None:
        self._host = host
        self._first = first
        self._out: set[int] = set()

    def take(self) -> int:
        """A free port, until it is given back.

        Raises:
            OSError: There is none.
        """
        candidates = range(self._first, LAST_PORT + 1) if self._first else (0,) * 100
        for candidate in candidates:
            if candidate in self._out:
                continue
            port = self._probe(candidate)
            if port is not None and port not in self._out:
                self._out.add(port)
                return port
        raise OSError(f"no free port on {self._host} from {self._first or 'any'} on")

    def give_back(self, port: int) -> None:
        """Let the port be handed out again."""
        self._out.discard(port)

    def _probe(self, port: int) -> int | None:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As llama-server binds: a port whose last connections linger is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self._host, port))
            except OSError:
                return None
            return int(probe.getsockname()[1])
