from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.exact import native
from shoal.exact.attention import Scores
from shoal.exact.layer import (
    Activation,
    AttentionPart,
    DenseLayer,
    FeedForward,
    attention_part,
    feed_forward,
    run_layer,
)
from shoal.exact.linear import Linear
from shoal.exact.native_layer import NativeLayers, NativeStep, norm_linear
from shoal.exact.numbers import rms_norm
from shoal.exact.weights import quantise_int4, quantise_int8

from .paged import Pages, Plain, Span, angles_at, pools

library = native.load()
pytestmark = pytest.mark.skipif(library is None, reason="no compiled library here")
VARIANTS = ("avx512vnni", "avxvnni", "avx2", "sse41", "neondot", "neon", "generic")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=VARIANTS)
def loaded(request: pytest.FixtureRequest) -> Iterator[native.Native]:
    assert library is not None
    before, threads = library.isa, library.threads
    if not library.set_isa(request.param):
        pytest.skip(f"{request.param} cannot run here")
    yield library
    library.set_isa(before)
    library.set_threads(threads)


@dataclass(frozen=True)
class Shape:
    kv_heads: int = 2
    group: int = 2
    width: int = 32
    hidden: int = 64
    wide: int = 96
    rotated: int = 32  # at most width, even
    int4: bool = False
    bias: bool = False
    head_norms: str = "none"  # "each" head, or "all" heads together
    after: bool = False
    activation: Activation = "silu"
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


def norm(width: int) -> Tensor:
    return torch.rand(width) + 0.5


def linear(shape: Shape, inputs: int, outputs: int) -> Linear:
    weight = torch.randn(outputs, inputs) / inputs**0.5
    bias = torch.randn(outputs) * 0.1 if shape.bias else None
    return Linear(quantise_int4(weight) if shape.int4 else quantise_int8(weight), bias)


def head_norm(shape: Shape, heads: int) -> Tensor | None:
    widths = {"each": shape.width, "all": shape.width * heads}
    return norm(widths[shape.head_norms]) if shape.head_norms in widths else None


def layer_of(shape: Shape) -> DenseLayer:
    heads = shape.kv_heads * shape.group
    sinks = torch.randn(heads) if shape.sinks else None
    attention = AttentionPart(
        norm=norm(shape.hidden),
        qkv=linear(shape, shape.hidden, (heads + 2 * shape.kv_heads) * shape.width),
        out=linear(shape, heads * shape.width, shape.hidden),
        heads=heads,
        kv_heads=shape.kv_heads,
        width=shape.width,
        scores=Scores(shape.width**-0.5, shape.window, sinks, shape.softcap),
        query_norm=head_norm(shape, heads),
        key_norm=head_norm(shape, shape.kv_heads),
        after=norm(shape.hidden) if shape.after else None,
        eps=1e-5,
    )
    mlp = FeedForward(
        norm=norm(shape.hidden),
        gate_up=linear(shape, shape.hidden, 2 * shape.wide),
        down=linear(shape, shape.wide, shape.hidden),
        activation=shape.activation,
        after=norm(shape.hidden) if shape.after else None,
    )
    return DenseLayer(attention, mlp)


class Both:
    """The same layers twice, each form with its own cache."""

    def __init__(self, shape: Shape, layers: list[DenseLayer], pages: Pages) -> None:
        assert library is not None
        self.layers, self.pages, self.half = layers, pages, shape.rotated // 2
        self.plain = [Plain(pages.rows) for _ in layers]
        made = [pools(pages.slots, shape.kv_heads, shape.width) for _ in layers]
        self.compiled = NativeLayers(library, list(zip(layers, made, strict=True)))

    def agree(self, spans: list[Span], dtype: torch.dtype) -> bool:
        """Whether one step gives the same bits."""
        hidden = len(self.layers[0].attention.norm)
        x = (torch.randn(sum(count for _, count in spans), hidden) * 3).to(dtype).float()
        angles = angles_at(spans, self.half), angles_at(spans, self.half, 1e6)
        expected = x
        for layer, attend in zip(self.layers, self.plain, strict=True):
            attend.spans = spans
            expected = run_layer(layer, expected, angles[layer.attention.rotary], attend, dtype)
        self.compiled.run(self.pages.step(spans, angles), x, dtype)
        return torch.equal(x, expected)


shapes = st.builds(
    Shape,
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3]),
    width=st.sampled_from([32, 48, 64, 128, 256]),
    hidden=st.sampled_from([1, 33, 64, 131]),
    wide=st.sampled_from([5, 96, 131]),
    rotated=st.sampled_from([0, 2, 16, 32]),
    int4=st.booleans(),
    bias=st.booleans(),
    head_norms=st.sampled_from(["none", "each", "all"]),
    after=st.booleans(),
    activation=st.sampled_from(["silu", "gelu_tanh"]),
    window=st.sampled_from([None, 1, 30, 128, 300]),
    softcap=st.sampled_from([None, 20.0]),
    sinks=st.booleans(),
)
histories = st.lists(
    st.tuples(st.sampled_from([1, 5, 40, 130, 600]), st.sampled_from([1, 1, 3, 50])),
    min_size=1,
    max_size=3,
)


@settings(max_examples=int(os.environ.get("SHOAL_EXAMPLES", "8")), deadline=None)
@given(
    shape=shapes,
    histories=histories,
    page_size=st.sampled_from([1, 5, 16, 64]),
    dtype=st.sampled_from(DTYPES),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
@pytest.mark.usefixtures("loaded")
def test_layers_have_the_bits_of_the_plain_form(
    shape: Shape,
    histories: list[tuple[int, int]],
    page_size: int,
    dtype: torch.dtype,
    threads: int,
    seed: int,
) -> None:
    assert library is not None
    library.set_threads(threads)
    torch.manual_seed(seed)
    one, two = layer_of(shape), layer_of(shape)
    two = replace(two, attention=replace(two.attention, rotary=1))
    pages = Pages(len(histories), max(map(sum, histories)) // page_size + 1, page_size, seed)
    both = Both(shape, [one, two], pages)
    starts = [0] * len(histories)
    for counts in zip(*histories, strict=True):
        assert both.agree(list(zip(starts, counts, strict=True)), dtype)
        starts = [start + count for start, count in zip(starts, counts, strict=True)]


def test_many_rows_in_one_step_have_the_bits_of_each_alone() -> None:
    torch.manual_seed(0)
    shape = Shape(group=4, hidden=128, wide=200)
    both = Both(shape, [layer_of(shape)], Pages(32, 4, 16))
    assert both.agree([(0, 1 + row) for row in range(32)], torch.bfloat16)
    assert both.agree([(1 + row, 1) for row in range(32)], torch.bfloat16)


def test_a_chunk_longer_than_is_computed_at_once_has_the_same_bits() -> None:
    torch.manual_seed(0)
    shape = Shape(kv_heads=1)
    both = Both(shape, [layer_of(shape)], Pages(1, 65, 16))
    assert both.agree([(0, 1030)], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_sizes_of_numbers_are_rounded_to_the_travelling_type(
    loaded: native.Native, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    part = replace(layer_of(Shape()).feed_forward, down=Linear(quantise_int8(torch.zeros(64, 96))))
    x = torch.randn(40, 64) * 2.0 ** torch.randint(-40, 20, (40, 64))
    x[0, :6] = torch.tensor([65519.99, 65520.0, -65504.0, 2.0**-25, -(2.0**-24) * 1.5, 3e38])
    expected = x.to(dtype).float()
    step = NativeStep([], [], [], 16, torch.zeros(40, dtype=torch.int64))
    NativeLayers(loaded, [(part, None)]).run(step, x, dtype)
    assert torch.equal(x, expected)


def test_parts_of_a_layer_run_alone() -> None:
    torch.manual_seed(0)
    layer, pages, plain = layer_of(Shape(after=True)), Pages(1, 4, 16), Plain(1)
    plain.spans = spans = [(0, 9)]
    x, angles = torch.randn(9, 64), angles_at(spans, 16)
    step = pages.step(spans, [angles])
    assert library is not None
    expected = x + attention_part(layer.attention, x, angles, plain)
    attention = NativeLayers(library, [(layer.attention, pools(pages.slots, 2, 32))])
    attention.run(step, x, torch.bfloat16)
    assert torch.equal(x, expected)
    expected = (x + feed_forward(layer.feed_forward, x)).bfloat16().float()
    NativeLayers(library, [(layer.feed_forward, None)]).run(step, x, torch.bfloat16)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("rows", [1, 50])
def test_the_last_norm_and_the_head_in_one_call(loaded: native.Native, rows: int) -> None:
    torch.manual_seed(0)
    x, weight, head = torch.randn(rows, 131), norm(131), linear(Shape(int4=True), 131, 77)
    expected = head(rms_norm(x, weight, 1e-6))
    assert torch.equal(norm_linear(loaded, x, weight, 1e-6, head), expected)


def test_some_of_the_layers_have_the_bits_of_these_alone(loaded: native.Native) -> None:
    torch.manual_seed(0)
    layers, pages = [layer_of(Shape()) for _ in range(4)], Pages(1, 1, 16)
    step, x = pages.step([(0, 9)], [angles_at([(0, 9)], 16)]), torch.randn(9, 64)
    every = NativeLayers(loaded, [(layer, pools(16, 2, 32)) for layer in layers])
    for start, stop in ((0, 4), (1, 3), (0, 1), (2, 4)):
        own = [(layer, pools(16, 2, 32)) for layer in layers[start:stop]]
        found, expected = x.clone(), x.clone()
        every.run(step, found, torch.bfloat16, range(start, stop))
        NativeLayers(loaded, own).run(step, expected, torch.bfloat16)
        assert torch.equal(found, expected)
    for wrong in (range(5), range(-1, 2), range(2, 2), range(0, 4, 2)):
        with pytest.raises(ValueError, match="of 4"):
            every.run(step, x, torch.bfloat16, wrong)


def test_tokens_without_angles_are_refused() -> None:
    layer, pages = layer_of(Shape()), Pages(1, 1, 16)
    assert library is not None
    layers = NativeLayers(library, [(layer, pools(16, 2, 32))])
    with pytest.raises(ValueError, match="do not fit"):
        layers.run(pages.step([(0, 2)]), torch.randn(2, 64), torch.float32)


def test_rows_of_another_width_are_refused() -> None:
    layer, pages = layer_of(Shape()), Pages(1, 1, 16)
    assert library is not None
    layers = NativeLayers(library, [(layer, pools(16, 2, 32))])
    step = pages.step([(0, 2)], [angles_at([(0, 2)], 16)])
    with pytest.raises(ValueError, match="for 2 tokens"):
        layers.run(step, torch.randn(2, 65), torch.float32)


def test_pools_of_another_shape_are_refused() -> None:
    assert library is not None
    with pytest.raises(ValueError, match="pools of"):
        NativeLayers(library, [(layer_of(Shape()), pools(16, 2, 64))])
