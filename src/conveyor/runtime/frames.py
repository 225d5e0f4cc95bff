"""Values on a socket between two processes: pickled, with their large buffers beside the pickle, where only the kernel copies them."""

from __future__ import annotations

import asyncio
import io
import pickle
import socket
import struct
from typing import Any, Final, NamedTuple

LARGE: Final = 64 * 1024
"""Bytes from which on a buffer travels beside the pickle instead of in it."""
HEAD: Final = struct.Struct("!?QI")
"""Whether a value follows, the bytes of its pickle, and how many buffers come behind it."""
BUFFER: Final = struct.Struct("!Q?")
"""Of each of these: its bytes, and whether they may be changed (bytearray) or not (bytes)."""
SIGNAL: Final = HEAD.pack(False, 0, 0)
"""A frame without a value: a nod."""

Part = bytes | memoryview


class Frame(NamedTuple):
    """What arrived: a pickle with its buffers; without either, a nod."""

    pickled: bytes | bytearray
    buffers: list[bytes | bytearray]

    def value(self) -> Any:
        """What was sent. It may import modules, and raise anything that these do."""
        return pickle.loads(self.pickled, buffers=self.buffers)  # noqa: S301 - of our own making, from a process of our own


def lent(value: Any) -> Any:
    """The same value for pack(), so that it travels beside the pickle if it is many bytes; it arrives as what it is.

    What knows of buffers by itself, such as an array of numpy, needs no lending, wherever in a value it is.
    """
    return pickle.PickleBuffer(value) if type(value) in (bytes, bytearray) and len(value) >= LARGE else value


def pack(value: Any) -> list[Part]:
    """A value as the parts of a frame, to be sent one after the other; large buffers are parts of their own, and not copied.

    Raises:
        Exception: it cannot be pickled.
    """
    buffers: list[memoryview] = []

    def inside(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < LARGE:
            return True
        buffers.append(raw)
        return False

    pickled = pickle.dumps(value, 5, buffer_callback=inside)
    head = HEAD.pack(True, len(pickled), len(buffers))
    head += b"".join(BUFFER.pack(raw.nbytes, not raw.readonly) for raw in buffers)
    first: list[Part] = [head + pickled] if len(pickled) < LARGE else [head, pickled]
    return first + buffers


# --- where nothing may block ----------------------------------------------------------------------------------------------


async def send_soon(line: socket.socket, parts: list[Part]) -> None:
    """Send a frame over a non-blocking socket, and let go of each part once it is sent."""
    loop = asyncio.get_running_loop()
    parts.reverse()
    while parts:
        await loop.sock_sendall(line, parts.pop())


async def receive_soon(line: socket.socket) -> Frame:
    """Receive a frame from a non-blocking socket.

    Raises:
        OSError: the line has ended.
    """
    _, size, count = HEAD.unpack(await _filled(line, bytearray(HEAD.size)))
    kinds = list(BUFFER.iter_unpack(await _filled(line, bytearray(count * BUFFER.size))))
    pickled = await _filled(line, bytearray(size))
    buffers: list[bytes | bytearray] = []
    for length, mutable in kinds:
        if mutable:
            buffers.append(await _filled(line, bytearray(length)))
        else:
            buffers.append(await _bytes(line, length))
    return Frame(pickled, buffers)


async def _bytes(line: socket.socket, size: int) -> bytes:
    """Straight into the bytes object that is returned, which only BytesIO lets one fill."""
    store = io.BytesIO()
    store.seek(size - 1)
    store.write(b"\0")
    with store.getbuffer() as view:
        await _fill(line, view)
    return store.getvalue()


async def _filled(line: socket.socket, room: bytearray) -> bytearray:
    with memoryview(room) as view:
        await _fill(line, view)
    return room


async def _fill(line: socket.socket, view: memoryview) -> None:
    loop = asyncio.get_running_loop()
    while view:
        received = await loop.sock_recv_into(line, view)
        if not received:
            raise ConnectionResetError("the line has ended")
        view = view[received:]


# --- where one may wait ---------------------------------------------------------------------------------------------------


def send(line: socket.socket, parts: list[Part]) -> None:
    """Send a frame over a blocking socket."""
    for part in parts:
        line.sendall(part)


def receive(line: socket.socket) -> Frame:
    """Receive a frame from a blocking socket.

    Raises:
        OSError: the line has ended.
    """
    _, size, count = HEAD.unpack(_read(line, HEAD.size))
    kinds = list(BUFFER.iter_unpack(_read(line, count * BUFFER.size)))
    pickled = _read(line, size)
    return Frame(
        pickled, [_read_mutable(line, length) if mutable else _read(line, length) for length, mutable in kinds]
    )


def _read(line: socket.socket, size: int) -> bytes:
    """As one bytes object that the kernel has filled, unless a signal comes between."""
    pieces = []
    while size:
        piece = line.recv(size, socket.MSG_WAITALL)
        if not piece:
            raise ConnectionResetError("the line has ended")
        pieces.append(piece)
        size -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _read_mutable(line: socket.socket, size: int) -> bytearray:
    room = bytearray(size)
    with memoryview(room) as whole:
        view = whole
        while view:
            received = line.recv_into(view)
            if not received:
                raise ConnectionResetError("the line has ended")
            view = view[received:]
    return room
