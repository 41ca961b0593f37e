import torch

from shoal.exact.attention import Context
from shoal.exact.latent import attend_latents
from shoal.exact.numbers import round_rows

HEADS, RANK, TURNED, PLACES = 4, 24, 8, 256


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LATENTS, KEYS = noise(PLACES, 1, RANK, seed=1), noise(PLACES, 1, TURNED, seed=2) * 50


def context(rows: int = 1, places: int = PLACES) -> Context:
    parts = []
    for x in (LATENTS, KEYS):
        codes, scale = round_rows(x[:places])
        parts += [codes.to(torch.int16).expand(rows, *codes.shape), scale.expand(rows, places, 1)]
    return Context(torch.zeros(rows, dtype=torch.int64), *parts)


def plain(q: torch.Tensor, positions: torch.Tensor, scaling: float) -> torch.Tensor:
    keys = torch.cat((LATENTS, KEYS), -1)[:, 0].double()
    scores = torch.einsum("nhd,sd->nhs", q.double(), keys) * scaling
    scores.masked_fill_(torch.arange(PLACES) > positions[:, None, None], -torch.inf)
    return torch.einsum("nhs,sr->nhr", scores.softmax(-1), LATENTS[:, 0].double()).float()


def queries(count: int) -> torch.Tensor:
    q = noise(1, count, HEADS, RANK + TURNED)
    q[..., RANK:] /= 50
    return q


def test_it_is_attention_with_keys_of_both_parts_and_latents_as_values() -> None:
    q, positions = queries(5), torch.arange(131, 136)
    out = attend_latents(q, positions[None], context(), 0.2)
    expected = plain(q[0], positions, 0.2)
    assert (out[0] - expected).norm() < 2e-3 * expected.norm()


def test_a_token_has_the_same_bits_in_any_chunk_batch_and_padding() -> None:
    q, positions = queries(90), torch.arange(30, 120)
    whole = attend_latents(q, positions[None], context(), 0.2)[0]
    for start, stop in ((0, 1), (7, 50), (89, 90)):
        part = attend_latents(q[:, start:stop], positions[None, start:stop], context(1, 128), 0.2)
        assert torch.equal(part[0], whole[start:stop])
    batch = q[0, [3, 80, 41]][:, None]
    among = attend_latents(batch, positions[[3, 80, 41]][:, None], context(3), 0.2)
    assert torch.equal(among[:, 0], whole[[3, 80, 41]])
