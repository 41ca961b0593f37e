"""What all formats have in common: several stored tensors stand for one weight.

The weight's name and shape are those that the architecture knows; the stored ones differ from it by
their endings (`X.weight` may lie there as `X.qweight`, `X.scales`, ...).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from ...errors import UnsupportedModel
from ..safetensors_header import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from .integers import Grouped
    from .mxfp4 import Fp4

MAIN = "main"  # the role of the tensor that holds the codes
FLOATS = frozenset({"F32", "F16", "BF16"})
CLUES = (  # beside some weights: how activations and the cache were rounded, which we do not need
    ".input_scale",
    ".input_scale_ub",
    ".output_scale",
    ".activation_scale",
    ".k_scale",
    ".v_scale",
    ".q_scale",
)


class Part(NamedTuple):
    """A stored tensor under its own name."""

    name: str
    info: TensorInfo


@dataclass(frozen=True, slots=True)
class Plain:
    """One tensor as the architecture knows it. `layout` None: stored just so."""

    shape: tuple[int, ...]
    parts: Mapping[str, Part]  # by role
    layout: Layout | None = None

    @property
    def stored_bytes(self) -> int:
        return sum(part.info.bytes for part in self.parts.values())


class Layout(ABC):
    """One way to store a weight. `endings` says by role how its stored tensors end."""

    title: str  # for people
    plain: ClassVar[str]  # how the weight's own name ends
    endings: ClassVar[Mapping[str, tuple[str, ...]]]
    needed: ClassVar[frozenset[str]]  # roles without which nothing can be read
    dtypes: ClassVar[Mapping[str, frozenset[str]]]  # what a role may be stored as

    def group(self, name: str, tensors: Mapping[str, TensorInfo]) -> dict[str, Part] | None:
        """The parts of the weight whose codes are `name`; None when `name` holds no codes of ours.

        Raises UnsupportedModel when a part is missing or of another type.
        """
        (ending,) = self.endings[MAIN]
        if not name.endswith(ending) or tensors[name].dtype not in self.dtypes[MAIN]:
            return None
        stem = name.removesuffix(ending)
        parts = {
            role: Part(stem + ending, tensors[stem + ending])
            for role, endings in self.endings.items()
            for ending in endings
            if stem + ending in tensors
        }
        if missing := sorted(self.needed - parts.keys()):
            raise self.refuse(name, f"it has no {', '.join(missing)} beside it")
        for role, part in parts.items():
            if part.info.dtype not in self.dtypes[role]:
                raise self.refuse(part.name, f"it is stored as {part.info.dtype}")
        return parts

    def name_of(self, stored: str) -> str:
        """X.qweight -> X.weight."""
        return stored.removesuffix(self.endings[MAIN][0]) + self.plain

    def refuse(self, name: str, why: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{name} does not fit the {self.title} layout: {why}",
            hint="download the checkpoint again, or take the unquantised one",
        )

    @abstractmethod
    def shape(self, parts: Mapping[str, Part]) -> tuple[int, ...]:
        """The weight's shape, by the headers. Raises UnsupportedModel when they contradict."""

    @abstractmethod
    def floats(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight in a float type that holds each product code * scale as float32 does."""

    def int4(self, parts: Mapping[str, Tensor]) -> Grouped | None:
        """The weight's own 4-bit codes, where it has such in plain groups of columns."""
        return None

    def fp4(self, parts: Mapping[str, Tensor]) -> Fp4 | None:
        """The weight's own 4-bit floats, where it has such."""
        return None


def plain_tensors(
    tensors: Mapping[str, TensorInfo], layouts: tuple[Layout, ...]
) -> dict[str, Plain]:
    """The tensors of a checkpoint under the names that its architecture knows, by headers alone.

    Raises UnsupportedModel when parts are missing or contradict each other.
    """
    packed = dict(_packed(tensors, layouts))
    used = {part.name for plain in packed.values() for part in plain.parts.values()}
    alone = {
        name: Plain(info.shape, {MAIN: Part(name, info)})
        for name, info in tensors.items()
        if name not in used and not (layouts and name.endswith(CLUES))
    }
    if twice := sorted(packed.keys() & alone.keys()):
        raise UnsupportedModel(f"{twice[0]} is stored twice, quantised and not")
    return alone | packed


def _packed(
    tensors: Mapping[str, TensorInfo], layouts: tuple[Layout, ...]
) -> Iterator[tuple[str, Plain]]:
    for name in tensors:
        for layout in layouts:
            parts = layout.group(name, tensors)
            if parts is not None:
                yield layout.name_of(name), Plain(layout.shape(parts), parts, layout)
                break
