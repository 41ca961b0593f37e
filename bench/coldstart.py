"""From the command to the first token: `shoal demo` with everything installed, nothing running.

The peer is what nobody can avoid: one Python process that imports torch and transformers' model
code. Both start cold processes, taking turns.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

from contract import Bench

AIM_S = 15.0
IMPORTS = "import torch; from transformers import LlamaForCausalLM"


def demo_s() -> tuple[float, float, float]:
    """Seconds to the mesh, to the first token, and to the end of the whole command."""
    command = [sys.executable, "-m", "shoal", "demo", "--json", "--max-tokens", "16"]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    whole = time.perf_counter() - started
    said = json.loads(done.stdout)
    return said["startup_s"], said["startup_s"] + said["ttft_s"], whole


def imports_s() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    bench = Bench("coldstart", __doc__)
    demo_s()  # fills the page cache, writes the byte code
    runs = [(demo_s(), imports_s()) for _ in range(2 if bench.quick else 5)]
    columns = list(zip(*(demo for demo, _ in runs), strict=True))
    bench.row(what="imports alone, one process", median_s=statistics.median(i for _, i in runs))
    for what, column in zip(
        ("mesh of 3 is up", "first token", "command ends"), columns, strict=True
    ):
        bench.row(what=what, median_s=statistics.median(column), slowest_s=max(column))
    first = statistics.median(columns[1])
    bench.aim("seconds to the first token", f"<= {AIM_S:g}", got=first, holds=first <= AIM_S)
    bench.finish()


if __name__ == "__main__":
    main()
