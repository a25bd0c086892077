"""Writes tests/data/verifiers/scores.json: what the environments beside it score by the package's own `score_group`.

Run it in an environment that has `verifiers` (0.1.14 made the committed file); this project is not needed:

    python scripts/reference/make_verifiers.py
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import json
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "tests" / "data" / "verifiers"
ANSWERS = ("It is 12.", "12", "seven", "", "twelve, that is 12")


def main() -> None:
    """Writes the file."""
    spec = importlib.util.spec_from_file_location("env", FOLDER / "env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = {"package": f"verifiers {importlib.metadata.version('verifiers')}"}
    result["answers"] = ANSWERS
    loaded = module.load_environment()
    result["row"] = loaded.get_dataset()[0]
    for name, env in (("load_environment", loaded), ("RANKED", module.RANKED)):
        states = [
            {
                "prompt": [{"role": "user", "content": "5 + 7 ="}],
                "completion": [{"role": "assistant", "content": text}],
                "answer": "12",
                "info": {},
                "task": "default",
                "trajectory": [],
            }
            for text in ANSWERS
        ]
        asyncio.run(env.rubric.score_group(states))
        result[name] = [{"reward": one["reward"], "metrics": one["metrics"]} for one in states]
    (FOLDER / "scores.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
