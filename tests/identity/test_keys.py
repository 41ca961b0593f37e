import multiprocessing
import os
from pathlib import Path

import pytest

from shoal.errors import BadConfig
from shoal.identity import Identity, friendly_name, load_or_create, node_of, public_key_of
from shoal.identity.words import ADJECTIVES, NOUNS


def test_the_same_secret_is_the_same_node() -> None:
    first, second = Identity.from_secret(b"a" * 32), Identity.from_secret(b"a" * 32)
    assert (first.node, first.transport_key, first.name) == (
        second.node,
        second.transport_key,
        second.name,
    )
    assert first.node != Identity.from_secret(b"b" * 32).node


def test_keys_and_name_of_a_secret_never_change() -> None:
    """Known answer: changing derivation or word lists would rename every node of every mesh."""
    identity = Identity.from_secret(b"1" * 32)
    assert identity.node == "npub142rlwudcxdlarsy4vvw7q8sf2dekj8czccl67f8g4a5lczn2r3msjfujpf"
    assert identity.name == "candid-gecko"
    assert identity.transport_key.hex() == (
        "136bd8d502938af5b5dcea19dc03995e0253b9a910b5eb681f3adea6bba05c35"
    )


def test_the_two_secrets_tell_nothing_about_each_other() -> None:
    identity = Identity.from_secret(b"a" * 32)
    assert len({identity.nostr_secret(), identity.transport_secret(), b"a" * 32}) == 3


def test_no_secret_is_shown() -> None:
    identity = Identity.from_secret(b"a" * 32)
    shown = repr(identity) + str(identity)
    for secret in (identity.nostr_secret(), identity.transport_secret(), b"a" * 32):
        assert secret.hex() not in shown
        assert repr(secret) not in shown
    assert identity.name in shown


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_secret_has_32_bytes(length: int) -> None:
    with pytest.raises(BadConfig, match="32 bytes"):
        Identity.from_secret(b"a" * length)


def test_the_word_lists_are_distinct_lower_case_and_complete() -> None:
    assert len(set(ADJECTIVES)) == len(set(NOUNS)) == len(ADJECTIVES) == len(NOUNS) == 256
    assert not set(ADJECTIVES) & set(NOUNS)
    assert all(w.isascii() and w.isalpha() and w.islower() for w in (*ADJECTIVES, *NOUNS))


def test_a_friendly_name_is_an_adjective_and_a_noun() -> None:
    adjective, noun = friendly_name("npub1whatever").split("-")
    assert adjective in ADJECTIVES
    assert noun in NOUNS


def test_a_node_id_and_its_key_are_the_same_thing() -> None:
    node = Identity.from_secret(b"a" * 32).node
    assert node_of(public_key_of(node)) == node


def test_the_secret_is_made_once_and_kept_from_others(tmp_path: Path) -> None:
    path = tmp_path / "data" / "secret"
    made = load_or_create(path)
    assert load_or_create(path).node == made.node
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_a_secret_that_others_can_read_is_refused_with_the_command_that_helps(
    tmp_path: Path,
) -> None:
    path = tmp_path / "secret"
    node = load_or_create(path).node
    path.chmod(0o640)
    with pytest.raises(BadConfig) as refused:
        load_or_create(path)
    assert refused.value.hint == f"chmod 600 {path}"
    path.chmod(0o600)
    assert load_or_create(path).node == node


@pytest.mark.parametrize("content", [b"", b"zz" * 32, b"ab" * 31, b"ab" * 33, b"\xff" * 64])
def test_a_malformed_secret_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(BadConfig, match="does not hold"):
        load_or_create(path)
    assert path.read_bytes() == content


def test_a_folder_in_the_secrets_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="cannot be used"):
        load_or_create(tmp_path)


def _node(path: Path) -> str:
    os.umask(0)
    return load_or_create(path).node


def test_processes_that_start_together_become_one_node(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert len(set(pool.map(_node, [tmp_path / "secret"] * 3))) == 1
