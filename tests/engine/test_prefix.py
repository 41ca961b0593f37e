"""Refcounts against a model of them, under any order of events."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.prefix import DIGEST_BYTES, PrefixPool, page_digests
from shoal.errors import Overloaded

ROOT = b"root"
PAGES, PAGE = 8, 2


def chain(*ids: int, root: bytes = ROOT) -> list[bytes]:
    return page_digests(ids, PAGE, root)


def filled(pool: PrefixPool, digests: list[bytes], owner: str = "a") -> tuple[int, ...]:
    """A session that computed these pages and ended."""
    pages = pool.take(len(digests))
    for digest, page in zip(digests, pages, strict=True):
        pool.name(owner, digest, page)
    pool.release(pages)
    return pages


@given(st.lists(st.integers(0, (1 << 32) - 1), max_size=40), st.integers(1, 7))
def test_a_chain_has_a_digest_for_each_whole_page_and_continues_from_any(
    ids: list[int], page: int
) -> None:
    digests = page_digests(ids, page, ROOT)
    assert len(digests) == len(ids) // page
    assert all(len(digest) == DIGEST_BYTES for digest in digests)
    for known in range(len(digests) + 1):
        assert page_digests(ids, page, ROOT, digests[:known]) == digests


def test_a_digest_covers_its_tokens_all_before_it_and_the_root() -> None:
    whole = chain(1, 2, 3, 4, 5, 6)
    other = chain(1, 2, 9, 4, 5, 6)
    assert other[0] == whole[0]
    assert not set(other[1:]) & set(whole)
    assert not set(chain(1, 2, 3, 4, 5, 6, root=b"other")) & set(whole)


def test_what_one_session_computed_the_next_one_finds() -> None:
    pool = PrefixPool(PAGES, PAGE)
    pages = filled(pool, chain(1, 2, 3, 4, 5, 6))
    assert pool.find("a", chain(1, 2, 3, 4, 9, 9)) == list(pages[:2])
    assert pool.find("a", chain(9, 2, 3, 4)) == []
    assert pool.used_fraction == 0
    assert pool.free_tokens == pool.total_tokens


def test_nobody_finds_another_owners_pages() -> None:
    pool = PrefixPool(PAGES, PAGE)
    filled(pool, chain(1, 2, 3, 4))
    assert pool.find("b", chain(1, 2, 3, 4)) == []


def test_the_least_recently_used_goes_first_and_the_end_of_a_text_before_its_beginning() -> None:
    pool = PrefixPool(PAGES, PAGE)
    old, new = chain(1, 1, 2, 2), chain(3, 3, 4, 4)
    filled(pool, old)
    filled(pool, new)
    again = pool.find("a", old)
    pool.hold(again)
    pool.release(again)  # used again: now `new` is the older
    pool.take(PAGES - 4 + 1)
    assert len(pool.find("a", new)) == 1
    assert len(pool.find("a", old)) == 2
    pool.take(2)
    assert len(pool.find("a", new)) == 0
    assert len(pool.find("a", old)) == 1


def test_held_pages_are_never_given_away() -> None:
    pool = PrefixPool(PAGES, PAGE)
    filled(pool, chain(1, 2, 3, 4))
    held = pool.find("a", chain(1, 2, 3, 4))
    pool.hold(held)
    assert not set(pool.take(PAGES - 2)) & set(held)
    with pytest.raises(Overloaded):
        pool.take(1)
    assert pool.find("a", chain(1, 2, 3, 4)) == held


def test_letting_go_twice_is_a_bug() -> None:
    pool = PrefixPool(PAGES, PAGE)
    pages = filled(pool, chain(1, 2))
    with pytest.raises(ValueError, match="not in use"):
        pool.release(pages)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["open", "open", "name", "end"]),
            st.integers(0, 9),
            st.lists(st.integers(0, 1), max_size=10),
        ),
        max_size=40,
    )
)
def test_every_page_is_free_idle_or_held_and_comes_back(
    events: list[tuple[str, int, list[int]]],
) -> None:
    pool = PrefixPool(PAGES, PAGE)
    sessions: list[tuple[list[bytes], tuple[int, ...]]] = []
    content: dict[int, bytes] = {}  # what was last written to a page
    for kind, number, ids in events:
        digests = chain(*ids)
        if kind == "open":
            found = pool.find("a", digests)
            assert [content[page] for page in found] == digests[: len(found)]
            pool.hold(found)
            wanted = len(digests) + 1 - len(found)
            if wanted > pool.free_pages:
                pool.release(found)
                continue
            own = pool.take(wanted)
            in_use = {page for _, pages in sessions for page in pages}
            assert not set(own) & in_use
            for page, digest in zip(own, [*digests[len(found) :], b"tail"], strict=True):
                content[page] = digest
            sessions.append((digests, (*found, *own)))
        elif sessions and kind == "name":
            chosen, pages = sessions[number % len(sessions)]
            for digest, page in zip(chosen, pages, strict=False):
                pool.name("a", digest, page)
        elif sessions:
            pool.release(sessions.pop(number % len(sessions))[1])
        in_use = {page for _, pages in sessions for page in pages}
        assert pool.free_pages == PAGES - len(in_use)
    for _, pages in sessions:
        pool.release(pages)
    assert pool.used_fraction == 0
    assert sorted(pool.take(PAGES)) == list(range(PAGES))
