"""Values travel between two processes as they are, and large buffers are copied by nobody but the kernel."""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor.runtime import frames

MUCH = 3_000_000


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
SIZES = st.sampled_from([0, 1, frames.LARGE - 1, frames.LARGE, 2 * frames.LARGE + 7])


@given(VALUES, st.lists(st.tuples(SIZES, st.booleans()), max_size=3))
def test_a_value_arrives_as_it_was_sent(value: Any, sizes: list[tuple[int, bool]]) -> None:
    plain = [bytearray(os.urandom(size)) if mutable else os.urandom(size) for size, mutable in sizes]
    buffers = [frames.lent(each) for each in plain]
    one, other = socket.socketpair()
    with one, other:
        sender = threading.Thread(target=frames.send, args=(one, frames.pack((value, buffers))))
        sender.start()
        arrived, there = frames.receive(other).value()
        sender.join()
    assert arrived == value
    assert [(type(each), each) for each in there] == [(type(each), each) for each in plain]


async def test_both_ways_speak_the_same(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    ours.setblocking(False)
    sent = [1, frames.lent(b"x" * MUCH), frames.lent(bytearray(b"y" * MUCH))]

    def echo() -> None:
        frame = frames.receive(theirs)
        value = frame.value()
        frames.send(theirs, frames.pack([value[0], frames.lent(value[1]), frames.lent(value[2])]))

    async with asyncio.timeout(60):
        back = asyncio.create_task(asyncio.to_thread(echo))
        await frames.send_soon(ours, frames.pack(sent))
        frame = await frames.receive_soon(ours)
        await back
    assert frame.value() == [1, b"x" * MUCH, bytearray(b"y" * MUCH)]
    assert [type(buffer) for buffer in frame.buffers] == [bytes, bytearray]


def test_large_bytes_are_sent_from_where_they_are() -> None:
    body = b"x" * MUCH
    first, second = frames.pack({"body": frames.lent(body)})
    assert isinstance(second, memoryview)
    assert second.obj is body
    assert len(first) < 200


async def test_what_arrives_as_bytes_is_not_copied_again(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    sender = threading.Thread(target=frames.send, args=(ours, frames.pack(frames.lent(b"x" * MUCH))))
    sender.start()
    frame = frames.receive(theirs)
    sender.join()
    assert frame.value() is frame.buffers[0]


def test_small_bytes_travel_in_the_pickle() -> None:
    assert len(frames.pack([frames.lent(b"x" * 100), bytearray(100)])) == 1


def test_a_nod_is_no_value(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    ours.sendall(frames.SIGNAL)
    frames.send(ours, frames.pack(None))
    assert not frames.receive(theirs).pickled
    assert frames.receive(theirs).value() is None


async def test_the_end_of_the_line_is_an_error_on_both_ways(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    first, *_ = frames.pack(frames.lent(b"x" * MUCH))
    ours.sendall(first)
    ours.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionResetError):
        frames.receive(theirs)
    theirs.sendall(first)
    theirs.shutdown(socket.SHUT_WR)
    ours.setblocking(False)
    with pytest.raises(ConnectionResetError):
        await frames.receive_soon(ours)


def test_what_cannot_be_pickled_is_an_error_before_anything_is_sent() -> None:
    with pytest.raises((TypeError, pickle.PicklingError)):
        frames.pack(threading.Lock())
