"""Stream a completion through the unchanged `openai` client.

shoal up --model shoal-tiny      # or: shoal demo --keep, and OPENAI_BASE_URL=what it prints
python examples/complete.py "def fibonacci(n):"
"""

import os
import sys

from openai import OpenAI

prompt = sys.argv[1] if len(sys.argv) > 1 else "def fibonacci(n):"
client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:7470/v1"),
    api_key=os.environ.get("SHOAL_API_KEY", "unused"),
)
model = client.models.list().data[0].id
stream = client.completions.create(
    model=model, prompt=prompt, max_tokens=48, temperature=0, stream=True
)
print(prompt, end="")
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].text, end="", flush=True)
print()
