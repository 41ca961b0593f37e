import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import BadConfig, BadProof
from shoal.identity import Mesh, Ticket

SECRET = bytes(range(32))


@given(st.binary(max_size=200))
def test_members_of_a_private_mesh_read_what_members_sealed(data: bytes) -> None:
    sealed = Mesh.private(SECRET).seal(data)
    assert Mesh.private(SECRET).open(sealed) == data
    assert len(sealed) == len(data) + 28


@given(st.binary(max_size=80))
def test_what_no_member_sealed_is_refused(data: bytes) -> None:
    with pytest.raises(BadProof):
        Mesh.private(SECRET).open(data)


def test_another_secret_opens_nothing() -> None:
    with pytest.raises(BadProof, match="not sealed with the secret"):
        Mesh.private(b"x" * 32).open(Mesh.private(SECRET).seal(b"hello"))


def test_every_changed_byte_breaks_the_seal() -> None:
    mesh = Mesh.private(SECRET)
    sealed = mesh.seal(b"hello")
    for at in range(len(sealed)):
        with pytest.raises(BadProof):
            mesh.open(sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :])


def test_a_public_mesh_seals_nothing() -> None:
    mesh = Mesh.public("my-club")
    assert mesh.open(mesh.seal(b"hello")) == b"hello"
    assert not mesh.is_private


def test_the_secret_shows_neither_in_topic_nor_in_text() -> None:
    mesh = Mesh.private(SECRET)
    for text in (mesh.topic, mesh.label, repr(mesh)):
        assert SECRET.hex() not in text
        assert repr(SECRET) not in text
        assert repr(mesh._key) not in text


def test_different_meshes_have_different_topics() -> None:
    meshes = [Mesh.public("a"), Mesh.public("b"), Mesh.private(SECRET), Mesh.private(b"x" * 32)]
    assert len({mesh.topic for mesh in meshes}) == 4
    assert Mesh.private(SECRET) == Mesh.private(SECRET)


def test_no_public_name_can_take_a_private_meshs_topic() -> None:
    """A public topic never holds a second slash nor the private prefix."""
    assert not Mesh.private(SECRET).topic.startswith(Mesh.public("x").topic[:-1])


@pytest.mark.parametrize("name", ["", "My-Club", "-a", "a b", "a/b", "ü", "a" * 65, "a\n"])
def test_a_name_that_relays_would_mangle_is_refused_with_advice(name: str) -> None:
    with pytest.raises(BadConfig) as refused:
        Mesh.public(name)
    assert "my-club" in refused.value.hint


@pytest.mark.parametrize("mesh", [Mesh.public("club"), Mesh.private(SECRET)])
def test_a_ticket_leads_to_its_mesh(mesh: Mesh) -> None:
    ticket = Ticket(mesh=mesh.name, secret=mesh.secret)
    assert Mesh.of(Ticket.decode(ticket.encode())) == mesh
