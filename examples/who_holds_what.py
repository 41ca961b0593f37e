"""Ask a node which layers of which model are held by whom: the data behind `shoal map`.

shoal up --model shoal-tiny
python examples/who_holds_what.py
"""

import os

import httpx

api = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:7470/v1")
key = os.environ.get("SHOAL_API_KEY", "unused")
answer = httpx.get(f"{api}/mesh", headers={"Authorization": f"Bearer {key}"})
answer.raise_for_status()
mesh = answer.json()

for model in mesh["models"]:
    health = "complete" if model["ready"] else f"missing {', '.join(model['missing'])}"
    print(f"{model['name']}: {model['total_layers']} layers, {health}")
    for node in mesh["nodes"]:
        for stage in node["stages"]:
            if stage["model"] == model["model"]:
                print(f"  {node['name']:<16} {stage['layers']:>7}  {stage['state']}")
