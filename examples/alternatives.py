"""What else the model thought of: each token of an answer with its probability and its rivals.

shoal up --model shoal-tiny
python examples/alternatives.py "import "
"""

import math
import os
import sys

from openai import OpenAI

prompt = sys.argv[1] if len(sys.argv) > 1 else "import "
client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:7470/v1"),
    api_key=os.environ.get("SHOAL_API_KEY", "unused"),
)
model = client.models.list().data[0].id
answer = client.completions.create(
    model=model, prompt=prompt, max_tokens=8, temperature=0, logprobs=3
)
logprobs = answer.choices[0].logprobs
assert logprobs, "no log-probabilities came back"
for token, rivals in zip(logprobs.tokens or [], logprobs.top_logprobs or [], strict=True):
    shares = ", ".join(f"{text!r} {math.exp(value):.0%}" for text, value in rivals.items())
    print(f"{token!r:<14} {shares}")
