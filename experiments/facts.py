"""Procedural tasks for the quickstart: a sentence's facts as a JSON record with two given keys.

Held-out sentences speak of people, places and employers that no training sentence has.
"""

from __future__ import annotations

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
    "company": "Acme Zenith Nordica Bluefin Solaris Quantum Meridian Vertex Aurora Polaris Fabrica Lumen Orbit Helix"
    " Cobalt Summit",
}  # fmt: skip

TEMPLATES = (
    "{name} is a {age} year old {job} from {city} who works for {company}.",
    "{name}, {age}, works as a {job} at {company} in {city}.",
    "At {company} in {city}, {name} ({age}) has a job as a {job}.",
    "{company} hired {name}, a {job} aged {age} who lives in {city}.",
    "In {city} lives {name}, {age} years old, {job} at {company}.",
)

PROMPT = 'Write the facts as one JSON object with the keys "{first}" and "{second}" and nothing else. {sentence}'


def rows(split: str = "train") -> Iterator[dict[str, Any]]:
    """Yields the rows of a split: 2,000 to train on, 200 held out."""
    rng = random.Random(f"facts/{split}")
    # Every fifth value is the held-out sentences' own.
    chosen = {
        key: [value for index, value in enumerate(text.split()) if (index % 5 == 4) == (split == "heldout")]
        for key, text in VALUES.items()
    }
    seen: set[str] = set()
    count = {"train": 2000, "heldout": 200}[split]
    while len(seen) < count:
        facts: dict[str, Any] = {key: rng.choice(values) for key, values in chosen.items()}
        facts["age"] = rng.randint(19, 79)
        first, second = rng.sample(sorted(facts), 2)
        sentence = rng.choice(TEMPLATES).format(**facts)
        text = PROMPT.format(first=first, second=second, sentence=sentence)
        if text in seen:
            continue
        seen.add(text)
        yield {
            "messages": [{"role": "user", "content": text}],
            "record": {first: facts[first], second: facts[second]},
        }
