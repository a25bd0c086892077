"""Writes tests/data/sentencepiece.json: a small byte-pair model by the sentencepiece package and what it encodes.

python -m venv /tmp/reference && /tmp/reference/bin/pip install sentencepiece
/tmp/reference/bin/python scripts/reference/make_sentencepiece.py
"""

import io
import json
from pathlib import Path

import sentencepiece

LINES = """The learner trains on what was sampled, token for token.
A trajectory keeps its tokens and their log-probabilities.
An evaluator scores the answer; an environment answers the model.
Numbers such as 1, 22, 333 and 4444 are split into digits.
def f(x):  return x  # two spaces stay two spaces
naïve café, unabhängig, über, wörld
Every step samples, scores, and updates the weights of the policy.
the the the of of and and to in a is that it was for on are as with
""".splitlines()
TEXTS = [
    "The learner trains on what was sampled.",
    "  two spaces before",
    " one",
    "a  b   c ",
    "line\nbreak\n\n  indented",
    "numbers 1234 and 3.14",
    "café 你好 ☃ 🙂",
    "tab\tand end",
    "unabhängig aaaa bbbb",
    "x",
    "def f(x):  return x",
]
OUT = Path(__file__).parents[2] / "tests" / "data" / "sentencepiece.json"


def main() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 5),
        model_writer=model,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
    )
    words = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = range(words.get_piece_size())

    def kind(index: int) -> int:
        if words.is_unknown(index):
            return 2
        return 3 if words.is_control(index) else 6 if words.is_byte(index) else 1

    found = {
        "pieces": [words.id_to_piece(index) for index in pieces],
        "scores": [words.get_score(index) for index in pieces],
        "types": [kind(index) for index in pieces],
        "texts": TEXTS,
        "ids": [words.encode(text) for text in TEXTS],
    }
    OUT.write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
