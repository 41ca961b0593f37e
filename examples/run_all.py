"""Run every example against a node that is started for it: what CI does.

python examples/run_all.py
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

HERE = Path(__file__).parent
NODE = ["up", "--json", "--exit-with-parent", "--no-lan", "--port", "0", "--listen", "127.0.0.1:0"]


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "SHOAL_HOME": home}
        node = subprocess.Popen(
            [sys.executable, "-m", "shoal", *NODE, "--model", "shoal-tiny"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert node.stdout
        try:
            api = json.loads(node.stdout.readline())["api"]
            while httpx.get(f"{api}/health").status_code != 200:  # its layers still load
                time.sleep(0.2)
            for example in sorted(HERE.glob("*.py")):
                if example.name != Path(__file__).name:
                    print(f"-- {example.name}", flush=True)
                    told = {**environment, "OPENAI_BASE_URL": f"{api}/v1"}
                    subprocess.run([sys.executable, str(example)], env=told, check=True)
        finally:
            node.terminate()
            node.wait()


if __name__ == "__main__":
    main()
