"""Length-framed pickles over a socket that parent and child inherited; never over a network."""

from __future__ import annotations

import pickle
import select
import socket
import struct
from typing import Any

_HEADER = struct.Struct(">Q")
_READ_BYTES = 1 << 20
_MAX_FDS = 8


class Closed(Exception):
    """The other side is gone."""


class Channel:
    """One end of a socket pair. Not thread-safe."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = bytearray()
        self.fds: list[int] = []  # file descriptors that came along, in order

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: Any, fds: list[int] | None = None) -> None:
        """Write one message, blocking; Closed if nobody reads any more."""
        body = pickle.dumps(message, protocol=5)
        data = _HEADER.pack(len(body)) + body
        try:
            if fds:
                sent = socket.send_fds(self.sock, [data], fds)
                data = data[sent:]
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError, OSError) as error:
            raise Closed(str(error)) from error

    def receive(self) -> Any:
        """The next message, blocking; Closed at the end."""
        while True:
            found, message = self._next()
            if found:
                return message
            self._fill()

    def drain(self) -> list[Any]:
        """All whole messages that can be had without blocking; Closed once the other side is gone and all is read."""
        gone = False
        ready = select.poll()  # select() knows descriptors up to 1023 only
        ready.register(self.sock, select.POLLIN)
        while ready.poll(0):
            try:
                self._fill()
            except Closed:
                gone = True
                break
        messages = []
        while True:
            found, message = self._next()
            if not found:
                break
            messages.append(message)
        if gone and not messages:
            raise Closed("end of stream")
        return messages

    def close(self) -> None:
        self.sock.close()

    def _next(self) -> tuple[bool, Any]:
        if len(self._buffer) < _HEADER.size:
            return False, None
        (length,) = _HEADER.unpack_from(self._buffer)
        end = _HEADER.size + length
        if len(self._buffer) < end:
            return False, None
        message = pickle.loads(bytes(self._buffer[_HEADER.size : end]))
        del self._buffer[:end]
        return True, message

    def _fill(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, _READ_BYTES, _MAX_FDS)
        except (ConnectionResetError, OSError) as error:
            raise Closed(str(error)) from error
        self.fds += fds
        if not data:
            raise Closed("end of stream")
        self._buffer += data


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends, not inherited unless asked for."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
