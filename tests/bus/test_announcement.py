import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from shoal.bus.announcement import MAX_ANNOUNCEMENT_BYTES, Announcement
from shoal.errors import BadMessage, BadProof
from shoal.units import Slice

from .nodes import AMBER, BIRCH, CAPABILITY, STAGE, announcement

SAID = announcement(AMBER)


def test_an_announcement_survives_the_bus() -> None:
    received = Announcement.decode(SAID.encode())
    assert received == SAID
    received.verify()
    assert received.node == AMBER.node


@pytest.mark.parametrize(
    "changes",
    [
        {"sequence": 2},
        {"gateway": False},
        {"addresses": ()},
        {"stages": ()},
        {"card": BIRCH.card},
        {"signature": b""},
        {"signature": bytes(64)},
        {"capability": replace(CAPABILITY, cores=3)},
    ],
)
def test_nothing_in_an_announcement_can_be_changed(changes: dict[str, object]) -> None:
    with pytest.raises(BadProof):
        replace(SAID, **changes).verify()


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "x" * 65},
        {"name": "\x1b[31mred"},
        {"software": "line\nbreak"},
        {"addresses": ("nowhere",)},
        {"addresses": ("host:1",) * 17},
        {"stages": (STAGE,) * 33},
        {"sequence": -1},
        {"sent_at": 1 << 60},
        {"capability": replace(CAPABILITY, cpu="\x1b[2J")},
    ],
)
def test_an_announcement_is_bounded_in_every_field(changes: dict[str, object]) -> None:
    fields = msgspec.structs.asdict(SAID) | changes
    with pytest.raises(ValueError, match=r"."):
        Announcement(**fields)
    with pytest.raises(BadMessage):
        Announcement.decode(msgspec.json.encode(fields))


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": Slice(0, 9)},
        {"total_layers": 5000},
        {"model_name": "x" * 201},
        {"queue": -1},
        {"speed": [-1.0]},
        {"compute": "f64"},
        {"state": "resting"},
    ],
)
def test_a_stage_is_bounded_in_every_field(changes: dict[str, object]) -> None:
    stage = msgspec.structs.asdict(STAGE) | changes
    fields = msgspec.structs.asdict(SAID) | {"stages": [stage]}
    with pytest.raises(BadMessage):
        Announcement.decode(msgspec.json.encode(fields))


def test_an_announcement_is_bounded_as_a_whole() -> None:
    stage = replace(STAGE, model_name="x" * 200)
    long = announcement(AMBER, stages=(stage,) * 32)
    assert len(msgspec.json.encode(long)) <= MAX_ANNOUNCEMENT_BYTES
    longer = replace(long, stages=(replace(stage, model="m" * 200),) * 32)
    with pytest.raises(ValueError, match="too large"):
        longer.encode()
    with pytest.raises(BadMessage, match="too large"):
        Announcement.decode(msgspec.json.encode(longer))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)


@settings(max_examples=60)
@given(st.binary(max_size=200) | json_values.map(msgspec.json.encode))
def test_random_bytes_are_a_bad_message(data: bytes) -> None:
    with pytest.raises(BadMessage):
        Announcement.decode(data)


@settings(max_examples=60)
@given(field=st.sampled_from(Announcement.__struct_fields__), value=json_values)
def test_any_value_in_any_field_is_a_bad_message_or_a_bad_proof(field: str, value: object) -> None:
    fields = msgspec.structs.asdict(SAID) | {field: value}
    try:
        received = Announcement.decode(msgspec.json.encode(fields))
    except BadMessage:
        return
    if received != SAID:
        with pytest.raises(BadProof):
            received.verify()


@pytest.mark.parametrize("data", [b"[" * 16_000, b'{"x":' * 3000, b"\xff", b'{"name":"\xff"}'])
def test_json_made_to_break_a_reader_is_a_bad_message(data: bytes) -> None:
    with pytest.raises(BadMessage):
        Announcement.decode(data)
