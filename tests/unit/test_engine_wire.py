"""Messages over a socket pair arrive whole, in order, with their file descriptors; or Closed."""

from __future__ import annotations

import os
import resource
import socket
import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanfold.engine.wire import Channel, Closed, pair


@pytest.fixture
def ends():
    left, right = (Channel(sock) for sock in pair())
    yield left, right
    left.close()
    right.close()


def sending(channel, messages):
    """A thread that sends, for messages larger than the socket's buffer."""
    thread = threading.Thread(target=lambda: [channel.send(message) for message in messages])
    thread.start()
    return thread


def frame(message):
    """The bytes of one message on the wire."""
    left, right = pair()
    with left, right:
        Channel(left).send(message)
        return right.recv(1 << 20)


TEXTS = st.text("aé\n\0😀", max_size=8)
MESSAGES = st.lists(st.one_of(st.none(), st.integers(), TEXTS, st.binary(), st.tuples(TEXTS, st.floats())), max_size=6)


@settings(max_examples=30)
@given(MESSAGES)
def test_messages_arrive_whole_and_in_order(messages):
    left, right = (Channel(sock) for sock in pair())
    for message in messages:
        left.send(message)
    left.close()
    received = [right.receive() for _ in messages]
    with pytest.raises(Closed):
        right.receive()
    right.close()
    assert repr(received) == repr(messages)  # nan is not equal to itself


@pytest.mark.parametrize("num_bytes", [0, 1, 65_536, (1 << 20) - 9, 1 << 20, (1 << 20) + 1, 5_000_000])
def test_a_message_of_any_size_arrives(ends, num_bytes):
    left, right = ends
    body = os.urandom(num_bytes)
    thread = sending(left, [body, "after"])
    assert right.receive() == body
    assert right.receive() == "after"
    thread.join()


@pytest.mark.slow
def test_a_message_of_200_mb_arrives(ends):
    left, right = ends
    body = bytes(200_000_000)
    thread = sending(left, [body])
    assert right.receive() == body
    thread.join()


def test_both_directions_work_at_once(ends):
    left, right = ends
    left.send("ping")
    right.send("pong")
    assert (left.receive(), right.receive()) == ("pong", "ping")


def test_a_message_cut_into_single_bytes_is_put_together():
    sock, other = pair()
    channel = Channel(other)
    data = frame(("beat", 3, "ü")) + frame("next")
    with sock, other:
        received = []
        for i in range(len(data)):
            sock.send(data[i : i + 1])
            received += channel.drain()
        assert received == [("beat", 3, "ü"), "next"]


# -- file descriptors -------------------------------------------------------------------------------------


def test_file_descriptors_come_along_in_order(ends):
    left, right = ends
    pipes = [os.pipe() for _ in range(4)]
    left.send("four", fds=[write for _, write in pipes])
    for _, write in pipes:
        os.close(write)
    assert right.receive() == "four"
    assert len(right.fds) == 4
    for (read, _), fd in zip(pipes, right.fds, strict=True):
        os.write(fd, b"x%d" % read)
        os.close(fd)
        assert os.read(read, 10) == b"x%d" % read
        assert os.read(read, 10) == b""  # no other copy of the writing end is left
        os.close(read)


def test_file_descriptors_of_several_messages_are_kept_in_order(ends):
    left, right = ends
    read, write = os.pipe()
    left.send("one", fds=[read])
    left.send("two", fds=[write])
    assert [right.receive(), right.receive()] == ["one", "two"]
    os.write(right.fds[1], b"through")
    assert os.read(right.fds[0], 10) == b"through"
    for fd in (read, write, *right.fds):
        os.close(fd)


def test_file_descriptors_come_along_with_a_large_message(ends):
    left, right = ends
    read, write = os.pipe()
    body = bytes(3_000_000)
    thread = threading.Thread(target=lambda: left.send(body, fds=[write]))
    thread.start()
    assert right.receive() == body
    thread.join()
    assert len(right.fds) == 1
    for fd in (read, write, *right.fds):
        os.close(fd)


def test_sockets_are_not_inherited_unless_asked_for():
    for sock in pair():
        assert not sock.get_inheritable()
        sock.close()


# -- closed -----------------------------------------------------------------------------------------------


def test_receive_at_the_end_is_closed(ends):
    left, right = ends
    left.close()
    with pytest.raises(Closed) as closed:
        right.receive()
    assert str(closed.value) == "end of stream"


def test_what_was_sent_before_the_end_is_still_received(ends):
    left, right = ends
    left.send("last words")
    left.close()
    assert right.receive() == "last words"
    with pytest.raises(Closed):
        right.receive()


def test_a_message_cut_off_by_the_end_is_closed_not_delivered():
    sock, other = pair()
    channel = Channel(other)
    sock.send(frame("whole") + frame("torn")[:-1])
    sock.close()
    assert channel.receive() == "whole"
    with pytest.raises(Closed) as closed:
        channel.receive()
    assert str(closed.value) == "end of stream"
    channel.close()


def test_sending_to_nobody_is_closed(ends):
    left, right = ends
    right.close()
    with pytest.raises(Closed):
        left.send("anyone?")


def test_sending_a_large_message_to_one_who_leaves_is_closed(ends):
    left, right = ends
    seen = []

    def send():
        try:
            left.send(bytes(10_000_000))
        except Closed as closed:
            seen.append(closed)

    thread = threading.Thread(target=send)
    thread.start()
    right.sock.recv(1000)
    right.close()
    thread.join()
    assert len(seen) == 1


def test_a_closed_channel_of_ones_own_is_closed(ends):
    left, _ = ends
    left.close()
    with pytest.raises(Closed):
        left.send("x")
    with pytest.raises(Closed):
        left.receive()


def test_what_cannot_be_pickled_leaves_the_channel_clean(ends):
    left, right = ends
    with pytest.raises((TypeError, AttributeError)):
        left.send(lambda: None)
    left.send("next")
    assert right.receive() == "next"


# -- drain ------------------------------------------------------------------------------------------------


def test_drain_gives_all_whole_messages_and_keeps_the_rest():
    sock, other = pair()
    channel = Channel(other)
    third = frame("third")
    sock.send(frame("first") + frame("second") + third[:10])
    assert channel.drain() == ["first", "second"]
    assert channel.drain() == []
    sock.send(third[10:])
    assert channel.drain() == ["third"]
    sock.close()
    channel.close()


@pytest.mark.parametrize("part", [1, 7, 8, 9])
def test_drain_waits_for_no_part_of_a_header(part):
    sock, other = pair()
    channel = Channel(other)
    data = frame("text")
    sock.send(data[:part])
    assert channel.drain() == []
    sock.send(data[part:])
    assert channel.drain() == ["text"]
    sock.close()
    channel.close()


def test_drain_of_nothing_does_not_block(ends):
    assert ends[1].drain() == []


def test_drain_at_the_end_gives_the_last_messages_then_closed(ends):
    left, right = ends
    left.send("one")
    left.send("two")
    left.close()
    assert right.drain() == ["one", "two"]
    for _ in range(2):
        with pytest.raises(Closed) as closed:
            right.drain()
        assert str(closed.value) == "end of stream"


def test_drain_and_receive_share_one_order(ends):
    left, right = ends
    for i in range(6):
        left.send(i)
    assert right.receive() == 0
    assert right.drain() == [1, 2, 3, 4, 5]


def test_drain_after_a_message_cut_off_by_the_end_is_closed():
    sock, other = pair()
    channel = Channel(other)
    sock.send(struct.pack(">Q", 1000) + b"torn")
    sock.close()
    with pytest.raises(Closed):
        channel.drain()
    channel.close()


def test_drain_works_on_a_file_descriptor_above_1023():
    """select() knows 1,024 descriptors; a parent of many units, or a notebook, may hold more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2100:
        pytest.skip(f"only {hard} file descriptors are allowed here")
    sock, other = pair()
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2100), hard))
    try:
        high = os.dup2(other.fileno(), 2050, inheritable=False)
        channel = Channel(socket.socket(fileno=high))
        Channel(sock).send("high")
        assert channel.drain() == ["high"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for one in (sock, other, channel):
            one.close()
