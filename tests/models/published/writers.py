"""Writes small checkpoints in the exact layouts of others, and beside each the plain checkpoint
that it stands for. Written from the formats' definitions, not from the code that reads them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# weight (N, K) float32 -> what is stored, by ending, and the weight that it stands for
Packer = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LINEARS = r"(self_attn|mlp)\..*_proj\.weight$"
EXPERTS = r"mlp\.experts\.\d+\..*_proj\.weight$"


def words(codes: Tensor, bits: int = 4, order: tuple[int, ...] | None = None) -> Tensor:
    """(rows, n) -> (rows, ceil(n * bits / 32)) int32; `order` lists the columns of a word."""
    per_word = 32 // bits
    room = -len(codes[0]) % per_word
    padded = torch.nn.functional.pad(codes.long(), (0, room)).view(len(codes), -1, per_word)
    order = order or tuple(range(per_word))
    word = sum(padded[..., column] << bits * place for place, column in enumerate(order))
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)  # type: ignore[arg-type, operator]


def groups(weight: Tensor, size: int) -> list[slice]:
    return [slice(at, min(at + size, weight.shape[1])) for at in range(0, weight.shape[1], size)]


def rounded(
    weight: Tensor, size: int, *, symmetric: bool, scale_dtype: torch.dtype, bits: int = 4
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes (N, K) 0..2**bits - 1, zeros (N, G), scales (N, G), and (code - zero) * scale."""
    top = (1 << bits) - 1
    codes, values = torch.zeros_like(weight), torch.zeros_like(weight)
    zeros, scales = [], []
    for columns in groups(weight, size):
        part = weight[:, columns]
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        span = 2 * part.abs().amax(1, keepdim=True) if symmetric else high - low
        scale = (span / top).to(scale_dtype).float()
        middle = torch.full_like(scale, 1 << bits - 1)
        zero = middle if symmetric else (-low / scale).round().clamp(1, top)
        code = ((part / scale).round() + zero).clamp(0, top)
        codes[:, columns], values[:, columns] = code, (code - zero) * scale
        zeros.append(zero)
        scales.append(scale)
    return codes, torch.cat(zeros, 1), torch.cat(scales, 1).to(scale_dtype), values


def fp8_blocks(weight: Tensor, block: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
    height, width = block
    rows, columns = range(0, weight.shape[0], height), range(0, weight.shape[1], width)
    codes, values = torch.zeros_like(weight).to(torch.float8_e4m3fn), torch.zeros_like(weight)
    scale = torch.zeros(len(rows), len(columns))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            at = (slice(row, row + height), slice(column, column + width))
            scale[i, j] = weight[at].abs().max() / 448
            codes[at] = (weight[at] / scale[i, j]).to(torch.float8_e4m3fn)
            values[at] = codes[at].float() * scale[i, j]
    return {".weight": codes, ".weight_scale_inv": scale}, values


def fp8_rows(weight: Tensor, *, whole: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """One scale a row, or a single one."""
    top = weight.abs().max().view(1, 1) if whole else weight.abs().amax(1, keepdim=True)
    scale = top / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    stored = {".weight": codes, ".weight_scale": scale.view(1) if whole else scale}
    return stored, codes.float() * scale


def int8_rows(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = (weight / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return {".weight": codes, ".weight_scale": scale}, codes.float() * scale.float()


def pack_quantized(
    weight: Tensor, size: int, *, symmetric: bool = True, bits: int = 4, shuffled: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """`shuffled`: neighbours belong to different groups, as weight_g_idx says (actorder)."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))
    order = order if shuffled else order.sort().values
    made = rounded(
        weight[:, order], size, symmetric=symmetric, scale_dtype=torch.bfloat16, bits=bits
    )
    back = order.argsort()
    codes, zeros, scales, values = made[0][:, back], made[1], made[2], made[3][:, back]
    stored = {
        ".weight_packed": words(codes, bits),
        ".weight_scale": scales,
        ".weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        stored[".weight_zero_point"] = words(zeros.t(), bits).t().contiguous()
    if shuffled:
        stored[".weight_g_idx"] = (back // size).to(torch.int32)
    return stored, values


def gptq(
    weight: Tensor,
    size: int,
    *,
    symmetric: bool,
    version: int = 1,
    desc_act: bool = False,
    bits: int = 4,
) -> tuple[dict[str, Tensor], Tensor]:
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(2))
    order = order if desc_act else order.sort().values
    made = rounded(
        weight[:, order], size, symmetric=symmetric, scale_dtype=torch.float16, bits=bits
    )
    back = order.argsort()
    codes, zeros, scales, values = made[0][:, back], made[1], made[2], made[3][:, back]
    stored = {
        ".qweight": words(codes, bits).t().contiguous(),
        ".qzeros": words(zeros.t() - int(version == 1), bits),
        ".scales": scales.t().contiguous(),
        ".g_idx": (back // size).to(torch.int32),
    }
    return stored, values


def awq(weight: Tensor, size: int) -> tuple[dict[str, Tensor], Tensor]:
    codes, zeros, scales, values = rounded(weight, size, symmetric=False, scale_dtype=torch.float16)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    stored = {
        ".qweight": words(codes.t(), order=order),
        ".qzeros": words(zeros.t(), order=order),
        ".scales": scales.t().contiguous(),
    }
    return stored, values


def mxfp4(weight_EKN: Tensor) -> tuple[dict[str, Tensor], Tensor]:  # noqa: N803
    """gpt-oss' experts (E, inputs, outputs) -> blocks and scales by (E, outputs, inputs)."""
    weight = weight_EKN.transpose(1, 2).contiguous()
    blocks = weight.view(*weight.shape[:2], -1, 32)
    exponent = (blocks.abs().amax(-1, keepdim=True) / 6).log2().ceil()
    distance = (blocks / exponent.exp2()).abs()[..., None] - torch.tensor(E2M1)
    code = distance.abs().argmin(-1)
    values = torch.tensor(E2M1)[code] * blocks.sign() * exponent.exp2()
    code = code + 8 * (blocks < 0)
    stored = {
        "_blocks": (code[..., 0::2] + 16 * code[..., 1::2]).to(torch.uint8),
        "_scales": (exponent[..., 0] + 127).to(torch.uint8),
    }
    return stored, values.view_as(weight).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class Case:
    """A family stored in a format."""

    family: str
    quantization: dict[str, Any]
    packer: Packer
    which: str = LINEARS  # names of the weights that are stored so
    ending: str = ".weight"  # of those names, replaced by the packer's
    extra: Mapping[str, Tensor] = field(default_factory=dict)  # beside each of them
    renamed: Mapping[str, Any] = field(default_factory=dict)  # in the published config.json


def int4_config(**weights: Any) -> dict[str, Any]:
    """As Kimi-K2-Thinking has it."""
    weights = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": 32,
        "num_bits": 4,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "group",
        "symmetric": True,
        "type": "int",
        **weights,
    }
    return {
        "config_groups": {
            "group_0": {
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": weights,
            }
        },
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*self_attn.*"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def float_config(**weights: Any) -> dict[str, Any]:
    config = int4_config(**{"num_bits": 8, "type": "float", "group_size": None, **weights})
    return {**config, "format": "float-quantized"}


def gptq_config(**changes: Any) -> dict[str, Any]:
    """As Qwen's have it."""
    return {
        "bits": 4,
        "group_size": 32,
        "damp_percent": 0.01,
        "desc_act": False,
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "quant_method": "gptq",
        **changes,
    }


DEEPSEEK_FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [48, 48],
}
QWEN_AWQ = {
    "bits": 4,
    "group_size": 32,
    "modules_to_not_convert": None,
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}
GPT_OSS = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
LLAMA_FBGEMM = {
    "activation_scale_ub": 1200.0,
    "modules_to_not_convert": ["lm_head"],
    "quant_method": "fbgemm_fp8",
}
STATIC = {".input_scale": torch.ones(1)}
CASES = {
    "deepseek_v3-fp8": Case("deepseek_v3", DEEPSEEK_FP8, lambda w: fp8_blocks(w, (48, 48))),
    "qwen3-fp8": Case("qwen3", DEEPSEEK_FP8, lambda w: fp8_blocks(w, (48, 48))),
    "llama-fbgemm": Case("llama", LLAMA_FBGEMM, fp8_rows),
    "llama-fp8-channel": Case("llama", float_config(strategy="channel"), fp8_rows),
    "llama-fp8-tensor": Case(
        "llama", float_config(strategy="tensor"), lambda w: fp8_rows(w, whole=True), extra=STATIC
    ),
    "llama-int8": Case(
        "llama",
        {**float_config(type="int", strategy="channel"), "format": "int-quantized"},
        int8_rows,
    ),
    "gpt_oss-mxfp4": Case("gpt_oss", GPT_OSS, mxfp4, r"experts\.(gate_up|down)_proj$", ""),
    "kimi_k2-int4": Case(
        "deepseek_v3",
        int4_config(),
        lambda w: pack_quantized(w, 32),
        EXPERTS,
        renamed={"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]},
    ),
    "llama-int4-zeros": Case(
        "llama",
        int4_config(symmetric=False, actorder="group"),
        lambda w: pack_quantized(w, 32, symmetric=False, shuffled=True),
    ),
    "qwen2-gptq": Case("qwen2", gptq_config(), lambda w: gptq(w, 32, symmetric=True)),
    "qwen2-gptq-desc_act": Case(
        "qwen2",
        gptq_config(desc_act=True, sym=False),
        lambda w: gptq(w, 32, symmetric=False, desc_act=True),
    ),
    "qwen3_moe-gptq": Case("qwen3_moe", gptq_config(), lambda w: gptq(w, 32, symmetric=True)),
    "qwen3-gptq8-v2": Case(
        "qwen3",
        gptq_config(bits=8, group_size=-1, checkpoint_format="gptq_v2"),
        lambda w: gptq(w, w.shape[1], symmetric=False, version=2, bits=8),
    ),
    "qwen3-awq": Case("qwen3", QWEN_AWQ, lambda w: awq(w, 32)),
}


def write(case: Case, source: Path, quantised: Path, plain: Path) -> None:
    """Store the checkpoint `source` in the case's format, and what that stands for, in floats."""
    tensors: dict[str, Tensor] = {}
    for file in source.glob("*.safetensors"):
        tensors.update(load_file(file))
    packed, floats = dict(tensors), dict(tensors)
    for name in [name for name in tensors if re.search(case.which, name)]:
        stored, floats[name] = case.packer(packed.pop(name))
        stem = name.removesuffix(case.ending)
        packed.update({stem + ending: tensor for ending, tensor in stored.items()})
        packed.update({stem + ending: tensor.clone() for ending, tensor in case.extra.items()})
    assert len(packed) > len(tensors)
    config = json.loads((source / "config.json").read_text())
    write_folder(
        quantised, packed, {**config, **case.renamed, "quantization_config": case.quantization}
    )
    write_folder(plain, floats, config)


def write_folder(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors")
