"""A network between a worker and the database that can be cut, hung and slowed down."""

import socket
import threading
import time
from contextlib import suppress
from typing import Literal

Mode = Literal["open", "cut", "hung", "slow"]
DELAY = 0.2  # seconds for each piece of data, while it is slow


class Proxy:
    """Listens on 127.0.0.1 and passes every connection on to a Unix socket."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.mode: Mode = "open"
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break all connections, and refuse new ones until the mode is another."""
        self.mode = "cut"
        for pair in list(self._pairs):
            _close(*pair)

    def close(self) -> None:
        """Serve no more."""
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            try:
                if self.mode == "cut":
                    raise ConnectionError
                server.connect(self._target)
            except OSError:
                _close(client, server)
                continue
            pair = (client, server)
            self._pairs.add(pair)
            for one, other in (pair, pair[::-1]):
                threading.Thread(target=self._pass, args=(one, other, pair), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket, pair: tuple[socket.socket, ...]) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                if self.mode == "slow":
                    time.sleep(DELAY)
                while self.mode == "hung":
                    time.sleep(0.05)
                other.sendall(data)
        self._pairs.discard(pair)
        _close(*pair)


def _close(*sockets: socket.socket) -> None:
    for one in sockets:
        with suppress(OSError):  # it was closed from the other side
            one.shutdown(socket.SHUT_RDWR)
        one.close()
