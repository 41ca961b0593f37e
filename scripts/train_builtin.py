"""Train shoal-tiny, the model that ships inside the package, on the CPU.

    python scripts/train_builtin.py --minutes 75 --out /tmp/shoal-tiny

The learning rate follows the share of the allotted minutes that has passed, so the run ends
annealed on any machine; the seed fixes tokenizer, weights and the order of the data, but how many
steps fit is up to the machine. Every few minutes OUT holds a complete Hugging Face checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from builtin_corpus import SourceFile, split, standard_library
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# B sequences of one micro-batch · T tokens of a sequence; ids are (B, T)

END_OF_TEXT = "<|endoftext|>"
CONTEXT_LENGTH = 1024
PIECES = "|".join(
    (
        r"(?<=\n)[ \t]+",  # the indentation of a line is one piece ...
        r"\n(?:[ \t]*\n)*",  # ... apart from the line ends, so that a prompt may stop at either
        r"[^\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+",
        r"\s+",
    )
)
CHAT_TEMPLATE = (
    "{{ messages | map(attribute='content') | join('\\n') }}"
    "{% if add_generation_prompt %}{{ '\\n' }}{% endif %}"
)


@dataclass(kw_only=True, frozen=True, slots=True)
class Recipe:
    """What the checkpoint in the package was trained with."""

    vocabulary: int = 4096
    tokens_per_step: int = 8192
    tokens_per_micro_batch: int = 1024
    lengths: tuple[tuple[float, int], ...] = ((0.0, 256), (0.65, 512), (0.9, 1024))
    warm_up: float = 0.01  # share of the time
    anneal: float = 0.5  # share of the time, at the end, in which the rate falls to zero
    matrix_rate: float = 0.005  # Muon, scaled to the update size of AdamW
    matrix_decay: float = 0.1
    vector_rate: float = 0.003  # AdamW: embedding and norms

    def rate(self, share: float) -> float:
        """Factor on the learning rates when this share of the time has passed."""
        return max(0.0, min(1.0, share / self.warm_up, (1.0 - share) / self.anneal))

    def length(self, share: float) -> int:
        """Tokens of a training sequence: short ones first, they are cheaper."""
        return [length for start, length in self.lengths if share >= start][-1]


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every string is encoded without loss, there is no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def new_model(vocabulary: int) -> LlamaForCausalLM:
    """5.4 M parameters; every layer starts as the identity (its two output matrices are zero)."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=448,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        attn_implementation="eager",  # on a CPU, compiled, faster than the flash kernel
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def documents(tokenizer: PreTrainedTokenizerFast, files: Sequence[SourceFile]) -> list[np.ndarray]:
    """Token ids of each file, <|endoftext|> in front."""
    encoded = tokenizer.backend_tokenizer.encode_batch([file.text for file in files])
    return [np.array([0, *one.ids], dtype=np.int64) for one in encoded]


def windows(parts: Sequence[np.ndarray], length: int, chance: random.Random) -> Iterator[Tensor]:
    """Windows of length + 1 tokens without end; each epoch cuts the text at other places."""
    parts = list(parts)
    while True:
        chance.shuffle(parts)
        stream = np.concatenate(parts)
        starts = list(range(chance.randrange(length), len(stream) - length, length))
        chance.shuffle(starts)
        for start in starts:
            yield torch.from_numpy(stream[start : start + length + 1])


def token_losses(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Nats of each token of ids (B, T) but the first of its row, shape (B * (T - 1),)."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
    )


@torch.no_grad()
def bits_per_byte(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, files: Sequence[SourceFile]
) -> float:
    """Each file by itself, in windows of the context length that share one token."""
    nats = 0.0
    for ids in documents(tokenizer, files):
        for start in range(0, len(ids) - 1, CONTEXT_LENGTH):
            window = torch.from_numpy(ids[start : start + CONTEXT_LENGTH + 1])
            nats += token_losses(model, window[None]).sum().item()
    return nats / math.log(2) / sum(file.byte_count for file in files)


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the checkpoint as Hugging Face lays it out, weights in bf16."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out, save_jinja_files=False)  # the template goes inside


class Trainer:
    """Muon for the matrices of the layers, AdamW for everything else."""

    def __init__(self, model: LlamaForCausalLM, recipe: Recipe, parts: list[np.ndarray]) -> None:
        self.recipe = recipe
        self.tokens = 0
        self._model, self._parts = model, parts
        self._chance = random.Random(0)
        self._length = 0
        self._losses = torch.compile(token_losses, dynamic=False)
        hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
        matrices = {id(p) for p in hidden}
        others = [p for p in model.parameters() if id(p) not in matrices]
        muon = torch.optim.Muon(
            hidden,
            lr=recipe.matrix_rate,
            weight_decay=recipe.matrix_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        adamw = torch.optim.AdamW(
            others, lr=recipe.vector_rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        self._optimizers = ((muon, recipe.matrix_rate), (adamw, recipe.vector_rate))

    def step(self, share: float) -> float:
        """One update when this share of the time has passed; returns the mean loss in nats."""
        loss = self._accumulate(self.recipe.length(share))
        for optimizer, rate in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * self.recipe.rate(share)
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def _accumulate(self, length: int) -> float:
        if length != self._length:
            self._length, self._windows = length, windows(self._parts, length, self._chance)
        rows = self.recipe.tokens_per_micro_batch // length
        micro_batches = self.recipe.tokens_per_step // self.recipe.tokens_per_micro_batch
        total = 0.0
        for _ in range(micro_batches):
            ids = torch.stack([next(self._windows) for _ in range(rows)])
            loss = self._losses(self._model, ids).mean() / micro_batches
            loss.backward()
            total += loss.item()
        self.tokens += self.recipe.tokens_per_step
        return total


def run(minutes: float, save_minutes: float, out: Path) -> None:
    """Train for so many minutes; leave the checkpoint and a log, one JSON object a line, in OUT."""
    recipe = Recipe()
    training, held_out = split(standard_library())
    tokenizer = train_tokenizer([file.text for file in training], recipe.vocabulary)
    parts = documents(tokenizer, training)
    model = new_model(recipe.vocabulary)
    trainer = Trainer(model, recipe, parts)
    out.mkdir(parents=True, exist_ok=True)
    report(
        out,
        training_files=len(training),
        training_bytes=sum(file.byte_count for file in training),
        training_tokens=sum(map(len, parts)),
        held_out_files=len(held_out),
        held_out_bytes=sum(file.byte_count for file in held_out),
        parameters=sum(p.numel() for p in model.parameters()),
    )
    began, saves, steps = time.monotonic(), 0, 0
    while (passed := (time.monotonic() - began) / 60) < minutes:
        loss = trainer.step(passed / minutes)
        steps += 1
        if steps % 20 == 0:
            report(out, minutes=passed, steps=steps, tokens=trainer.tokens, loss=loss)
        if passed >= (saves + 1) * save_minutes:
            saves += 1
            export(model, tokenizer, out)
            sample = bits_per_byte(model, tokenizer, held_out[::4])
            report(out, minutes=passed, tokens=trainer.tokens, held_out_sample=sample)
    export(model, tokenizer, out)
    rounded = LlamaForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    final = bits_per_byte(rounded, tokenizer, held_out)
    report(out, minutes=minutes, steps=steps, tokens=trainer.tokens, held_out=final)


def report(out: Path, **figures: float) -> None:
    """One line to the screen and to OUT/training.jsonl."""
    line = json.dumps({name: round(value, 4) for name, value in figures.items()})
    print(line, flush=True)
    with (out / "training.jsonl").open("a") as log:
        log.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=75.0)
    parser.add_argument("--save-minutes", type=float, default=5.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    run(arguments.minutes, arguments.save_minutes, arguments.out)


if __name__ == "__main__":
    main()
