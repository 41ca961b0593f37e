"""The options that several commands share, so that one name means one thing everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="One JSON value on stdout, for programs.")]
Api = Annotated[
    str | None,
    typer.Option(
        "--api",
        metavar="URL",
        help="The node to ask; the one running on this machine if not given.",
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", metavar="KEY", help="The node's API key, if it wants one."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", metavar="f32|bf16|f16", help="Compute type; the checkpoint's own if not given."
    ),
]
Quant = Annotated[
    str | None,
    typer.Option(
        "--quant", metavar="auto|none|int8|int4|w8|w4", help="Weights as they are, or rounded."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda[:N]|mps",
        help="What computes; auto takes a CUDA GPU that has room, else the CPU.",
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(
        "--draft",
        metavar="ngram|none|M",
        help="Who guesses tokens ahead: repeated text, nobody, or a smaller model.",
    ),
]
