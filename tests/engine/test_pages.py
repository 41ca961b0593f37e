import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.pages import PagePool
from shoal.errors import NoCapacity, Overloaded

sizes = st.integers(min_value=1, max_value=70)


@settings(max_examples=60)
@given(st.lists(st.tuples(sizes, st.booleans()), max_size=40))
def test_no_page_is_given_twice_and_none_is_lost(wishes: list[tuple[int, bool]]) -> None:
    pool = PagePool(16, 4)
    held: list[tuple[int, ...]] = []
    for tokens, give_back in wishes:
        if give_back and held:
            pool.free(held.pop(0))
        try:
            held.append(pool.allocate(tokens))
        except Overloaded:
            assert tokens > pool.free_tokens
        except NoCapacity:
            assert tokens > pool.total_tokens
        given_out = [page for pages in held for page in pages]
        assert len(set(given_out)) == len(given_out)
        assert set(given_out) <= set(range(16))
        assert pool.free_tokens == (16 - len(given_out)) * 4
        assert pool.used_fraction == len(given_out) / 16
    for pages in held:
        pool.free(pages)
    assert sorted(pool.allocate(pool.total_tokens)) == list(range(16))


@given(sizes)
def test_an_allocation_has_room_for_its_tokens_and_no_page_more(tokens: int) -> None:
    pages = PagePool(20, 4).allocate(tokens)
    assert 0 <= len(pages) * 4 - tokens < 4


def test_a_fresh_pool_gives_neighbours() -> None:
    assert PagePool(8, 4).allocate(12) == (0, 1, 2)


def test_what_fits_later_and_what_never_fits_are_told_apart() -> None:
    pool = PagePool(4, 4)
    pool.allocate(9)
    with pytest.raises(Overloaded):
        pool.allocate(8)
    with pytest.raises(NoCapacity, match="17 tokens do not fit into a KV cache of 16"):
        pool.allocate(17)


def test_a_refused_allocation_takes_nothing() -> None:
    pool = PagePool(4, 4)
    pool.allocate(12)
    with pytest.raises(Overloaded):
        pool.allocate(5)
    assert pool.free_tokens == 4


@pytest.mark.parametrize("pages", [(0,), (3,), (0, 0)])
def test_giving_back_what_is_not_in_use_is_a_bug(pages: tuple[int, ...]) -> None:
    pool = PagePool(4, 4)
    pool.free(pool.allocate(1))
    with pytest.raises(ValueError, match="not in use"):
        pool.free(pages)


def test_giving_back_one_page_twice_at_once_is_a_bug() -> None:
    pool = PagePool(4, 4)
    taken = pool.allocate(1)
    with pytest.raises(ValueError, match="not in use"):
        pool.free(taken * 2)
