import contextlib
import itertools
import random
import struct
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.errors import BadFrame, FrameTooLarge, PeerError
from shoal.transport.control import decode_control
from shoal.transport.frames import (
    CONTROL,
    PART,
    PART_BYTES,
    Frame,
    FrameLimits,
    FrameReader,
    check_sendable,
    encode,
    in_parts,
)

frames = st.builds(
    Frame,
    st.integers(min_value=0, max_value=254),
    st.binary(max_size=40),
    st.binary(max_size=200),
)


def wire_of(*sent: Frame) -> bytes:
    return b"".join(bytes(buffer) for frame in sent for buffer in encode(frame))


def prefix(length: int, version: int = 1, channel: int = 1, header_bytes: int = 0) -> bytes:
    return struct.pack(">IBBI", length, version, channel, header_bytes)


def plain(frame: Frame) -> tuple[int, bytes, bytes]:
    return frame.channel, frame.header, bytes(frame.body)


@given(st.lists(frames, max_size=8), st.integers(min_value=1, max_value=300))
def test_frames_survive_any_cut(sent: list[Frame], cut: int) -> None:
    wire, reader = wire_of(*sent), FrameReader()
    pieces = [wire[i : i + cut] for i in range(0, len(wire), cut)]
    got = [plain(frame) for piece in pieces for frame in reader.receive(piece)]
    assert got == [plain(frame) for frame in sent]


@given(st.lists(frames, min_size=1, max_size=5), st.lists(st.integers(0, 1500), max_size=6))
def test_frames_survive_uneven_cuts(sent: list[Frame], cuts: list[int]) -> None:
    wire, reader = wire_of(*sent), FrameReader()
    edges = sorted({0, len(wire), *(cut for cut in cuts if cut < len(wire))})
    pieces = [wire[a:b] for a, b in itertools.pairwise(edges)]
    got = [plain(frame) for piece in pieces for frame in reader.receive(piece)]
    assert got == [plain(frame) for frame in sent]


@given(st.lists(st.binary(max_size=120), max_size=6))
def test_random_bytes_raise_nothing_but_the_peers_fault(pieces: list[bytes]) -> None:
    reader = FrameReader(FrameLimits(max_header_bytes=1 << 10, max_body_bytes=1 << 10))
    with contextlib.suppress(PeerError):
        for piece in pieces:
            reader.receive(piece)


@given(frames, st.integers(min_value=0), st.integers(min_value=0, max_value=255))
def test_a_damaged_frame_raises_nothing_but_the_peers_fault(
    frame: Frame, place: int, value: int
) -> None:
    wire = bytearray(wire_of(frame, frame))
    wire[place % len(wire)] = value
    with contextlib.suppress(PeerError):
        FrameReader(FrameLimits(max_body_bytes=1 << 20)).receive(bytes(wire))


def allocated_by(reader: FrameReader, data: bytes) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(PeerError):
            reader.receive(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "wire",
    [
        prefix((32 << 20) + 7),  # a body of 32 MiB + 1
        prefix(0xFFFFFFFF),
        prefix(0xFFFFFFFF, header_bytes=0xFFFFFFF0),
        prefix(6 + (64 << 10) + 1, header_bytes=(64 << 10) + 1),
    ],
)
def test_an_oversized_frame_is_refused_before_anything_is_allocated(wire: bytes) -> None:
    assert allocated_by(FrameReader(), wire) < 16 << 10
    with pytest.raises(FrameTooLarge):
        FrameReader().receive(wire)


def test_the_largest_frame_is_accepted() -> None:
    limits = FrameLimits(max_header_bytes=8, max_body_bytes=1000)
    frame = Frame(3, b"h" * 8, b"b" * 1000)
    check_sendable(frame, limits)
    assert plain(FrameReader(limits).receive(wire_of(frame))[0]) == plain(frame)


def test_a_frame_that_is_too_large_is_not_sent() -> None:
    with pytest.raises(ValueError, match="exceeds"):
        check_sendable(Frame(1, b"", bytes(11)), FrameLimits(max_body_bytes=10))


@pytest.mark.parametrize("version", [0, 2, 255])
def test_another_version_is_refused(version: int) -> None:
    with pytest.raises(BadFrame, match=f"version {version}"):
        FrameReader().receive(prefix(6, version=version))


def test_a_frame_shorter_than_its_header_is_refused() -> None:
    for wire in (prefix(0), prefix(5), prefix(10, header_bytes=5)):
        with pytest.raises(BadFrame, match="shorter"):
            FrameReader().receive(wire)


def test_a_body_in_one_piece_is_not_copied() -> None:
    wire = wire_of(Frame(1, b"head", bytes(5000)))
    body = FrameReader().receive(wire)[0].body
    assert isinstance(body, memoryview)
    assert body.obj is wire


def test_a_small_body_does_not_pin_a_large_piece() -> None:
    wire = wire_of(Frame(1, b"", b"small"), Frame(1, b"", bytes(100_000)))
    assert isinstance(FrameReader().receive(wire)[0].body, bytes)


def test_sending_does_not_copy_the_body() -> None:
    body = bytearray(5000)
    buffers = encode(Frame(1, b"head", body))
    assert isinstance(buffers[1], memoryview)
    assert buffers[1].obj is body


def test_a_body_of_wide_items_is_counted_in_bytes() -> None:
    numbers = memoryview(struct.pack("<3i", 1, 2, 3)).cast("i")
    frame = FrameReader().receive(wire_of(Frame(1, b"", numbers)))[0]
    assert struct.unpack("<3i", frame.body) == (1, 2, 3)


def test_a_large_body_in_many_pieces_takes_its_own_size_once() -> None:
    body = random.Random(1).randbytes(4 << 20)
    wire = wire_of(Frame(1, b"", body))
    pieces = [wire[i : i + 65536] for i in range(0, len(wire), 65536)]
    reader = FrameReader()
    tracemalloc.start()
    try:
        got = [frame for piece in pieces for frame in reader.receive(piece)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert bytes(got[0].body) == body
    assert peak < len(body) + (1 << 20)


@given(st.binary(max_size=200))
@example(b"\x82\xa4type\xa7Goodbye\xa6reason\xa2\xff\xfe")  # not UTF-8
@example(b"\x91" * 5000 + b"\xc0")  # nested deeper than Python may recurse
def test_a_control_message_decodes_or_is_the_peers_fault(header: bytes) -> None:
    with contextlib.suppress(PeerError):
        decode_control(Frame(CONTROL, header))


@given(
    st.lists(st.binary(max_size=400_000), min_size=1, max_size=3),
    st.integers(min_value=1, max_value=200_000),
)
@settings(max_examples=30, deadline=None)
def test_what_travels_in_parts_arrives_whole_with_others_in_between(
    bodies: list[bytes], cut: int
) -> None:
    small = b"".join(map(bytes, encode(Frame(2, b"small"))))
    wire = b""
    for body in bodies:
        for part in in_parts(Frame(1, b"large", body)):
            assert len(part) <= PART_BYTES + 64
            wire += part + small
    reader = FrameReader()
    came = [f for at in range(0, len(wire), cut) for f in reader.receive(wire[at : at + cut])]
    assert [bytes(frame.body) for frame in came if frame.channel == 1] == bodies
    assert {frame.header for frame in came if frame.channel == 2} == {b"small"}
    assert reader.unfinished_bytes == 0


def test_a_part_within_a_part_is_refused() -> None:
    inner = b"".join(map(bytes, encode(Frame(PART, b"", b"x"))))
    outer = b"".join(map(bytes, encode(Frame(PART, b"", inner))))
    with pytest.raises(BadFrame):
        FrameReader().receive(outer)


def test_the_limits_hold_for_what_comes_in_parts() -> None:
    huge = b"".join(map(bytes, encode(Frame(1, b"", bytes(200)))))
    reader = FrameReader(FrameLimits(max_body_bytes=150))
    with pytest.raises(FrameTooLarge):
        reader.receive(b"".join(map(bytes, encode(Frame(PART, b"", huge[:100])))))
