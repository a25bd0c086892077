"""Procedural tasks for the quickstart: two facts of a sentence as a JSON record with the given keys.

Held-out sentences speak of people, jobs and cities that no training sentence has.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

VALUES = {
    "name": "Anna Ben Carla David Elena Felix Greta Hugo Irene Jonas Karin Leo Maria Nils Olga Paul Rosa Simon Tara Uwe"
    " Vera Walter Yara Zoe Adam Bella Cyril Dora Emil Fiona Gustav Helen Ivan Julia Kurt Laura Max Nora Oscar Petra",
    "city": "Oslo Paris Madrid Rome Berlin Vienna Prague Lisbon Dublin Athens Cairo Tokyo Seoul Lima Boston Denver"
    " Geneva Munich Turin Lyon Porto Bergen Krakow Zurich Milan Seville Hamburg Naples Austin Quito",
    "job": "nurse teacher baker pilot farmer lawyer painter driver plumber singer editor tailor dentist barber"
    " gardener cook writer welder surgeon librarian",
}  # fmt: skip

TEMPLATES = (
    "{name}, {age}, a {job}, lives in {city}.",
    "{name} is a {age} year old {job} from {city}.",
    "In {city} lives {name}, a {job} aged {age}.",
    "The {job} {name} from {city} is {age} years old.",
)

EXAMPLE: dict[str, Any] = {"name": "Ada", "age": 41, "job": "clerk", "city": "Kyiv"}


def rows(split: str = "train") -> Iterator[dict[str, Any]]:
    """Yields the rows of a split: 2,000 to train on, 200 held out."""
    rng = random.Random(f"facts/{split}")
    # Every fifth value belongs to the held-out sentences.
    chosen = {
        key: [v for i, v in enumerate(text.split()) if (i % 5 == 4) == (split == "heldout")]
        for key, text in VALUES.items()
    }
    seen: set[str] = set()
    while len(seen) < {"train": 2000, "heldout": 200}[split]:
        facts: dict[str, Any] = {key: rng.choice(values) for key, values in chosen.items()}
        facts["age"] = rng.randint(19, 79)
        first, second = rng.sample(sorted(facts), 2)
        sentence = rng.choice(TEMPLATES).format(**facts)
        question = f"{{{first}, {second}}}: {sentence}"
        if question in seen:
            continue
        seen.add(question)
        shown = json.dumps({second: EXAMPLE[second], first: EXAMPLE[first]})
        yield {
            "messages": [
                {"role": "system", "content": "Answer with JSON."},
                {
                    "role": "user",
                    "content": f"{{{second}, {first}}}: {TEMPLATES[0].format(**EXAMPLE)}",
                },
                {"role": "assistant", "content": shown},
                {"role": "user", "content": question},
            ],
            "record": {first: facts[first], second: facts[second]},
        }
