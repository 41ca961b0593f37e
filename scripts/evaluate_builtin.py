"""Print what the card of the built-in model claims: held-out bits per byte, size, a sample.

python scripts/evaluate_builtin.py [CHECKPOINT]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from builtin_corpus import SourceFile, split, standard_library
from train_builtin import bits_per_byte
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGED = Path(__file__).parents[1] / "src/shoal/models/builtin"
PROMPTS = ("def fibonacci(n):", "class Queue:\n    def __init__(self", "import os\nimport ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=PACKAGED)
    checkpoint = parser.parse_args().checkpoint
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    training, held_out = split(standard_library())
    print(f"size {sum(file.stat().st_size for file in checkpoint.iterdir())} bytes")
    print(f"parameters {sum(p.numel() for p in model.parameters())}")
    for name, files in (("trained on", training[:: len(training) // 20]), ("held out", held_out)):
        print(f"{name} {bits_per_byte(model, tokenizer, files):.3f} bits per byte, {sizes(files)}")
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            answer = model.generate(ids, max_new_tokens=64, do_sample=False)
        print(f"\n--- {prompt!r}, greedy\n{tokenizer.decode(answer[0])}")


def sizes(files: list[SourceFile]) -> str:
    return f"{len(files)} files, {sum(file.byte_count for file in files)} bytes"


if __name__ == "__main__":
    main()
