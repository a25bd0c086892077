"""Writes tests/data/tiktoken.json: a small file of ranks, and what the tiktoken package encodes with it.

python -m venv /tmp/reference && /tmp/reference/bin/pip install tiktoken
/tmp/reference/bin/python scripts/reference/make_tiktoken.py
"""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path

import tiktoken

ROOT = Path(__file__).parents[2]
LINES = (
    """The learner trains on what was sampled, token for token. It's what we'll see, they've said; I'd DON'T.
the the the of of and and to in a is that it was for on are as with HTTPServer parseJSON camelCase
naïve café über wörld Ünabhängig 12345 1,234 3.14 2026-11-29
强化学习 从 强化 学习 中 学习，人工智能 人工 智能。日本語の学習 かな カナ
aaaaaaaa aaaa abab ababab bbbbbb      spaces
def f(x):  return x  # two spaces\n\n\treturn\r\n
"""
    * 3
)
PIECES = 220
TEXTS = [
    "The learner trains on what was sampled.", "It's what WE'LL see: they'Ve DON'T 'tis", "  two spaces before",
    " one", "a  b   c ", "line\nbreak\n\n  indented\r\n\r\nmore \t\n x", "numbers 1234567 and 3.14, ¼ ٣٤٥ Ⅷ",
    "café 你好 ☃ 🙂👩‍👩‍👧", "强化学习english混合からカナ中文Ünabhängig", "HTTPServerParseJSONsNow iPhone McDonald",
    "aaaaaaaaaaaaaaaaaaaaaaa ababababababab bbbbbbbbbbbbb", "x", "\u00a0\u2003 wide\u3000 \u0085 \x1c end\u2028",
    "e\u0301a\u0300 ắ Å ſ K ﬁ ǅungla ʰa ـا", "zero\u200bwidth \ufeff \x00 \x7f", "!!!???\n\n... ---///\r\n//", "",
    "<|im_end|> is text and <|im_user|>user<|im_middle|>Hi[EOS]", "กขค ิ हिन्दी עברית العربية", "々〇〆ヶ㍻ 﨎 𠮷𠮷 豈",
]  # fmt: skip


def pieces() -> str:
    """Returns the pattern that rftjax splits text with, without importing what that module needs."""
    source = (ROOT / "rftjax" / "text" / "rank_tokenizer.py").read_text(encoding="utf-8")
    lines = source[source.index("_CHINESE =") : source.index("RESERVED =")]
    found: dict[str, str] = {}
    exec(lines, found)
    return found["PIECES"]


def odd(rng: random.Random) -> str:
    """Returns a text of characters of all kinds."""
    alphabet = "aaabAB'sStT re'll \t\n\r 129.,!-é强学日かカ\u0301🙂\u00a0Ü"
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 60)))


def main() -> None:
    from tiktoken._educational import bpe_train

    pattern = pieces()
    ranks = bpe_train(LINES, 256 + PIECES, r"\s?\S+|\s+", visualise=None)
    special = {"[BOS]": len(ranks), "[EOS]": len(ranks) + 1, "<|im_end|>": len(ranks) + 2}
    special |= {"<|im_user|>": len(ranks) + 3, "<|im_middle|>": len(ranks) + 17}
    theirs = tiktoken.Encoding(
        "kimi", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
    )
    rng = random.Random(0)
    texts = [*TEXTS, *(odd(rng) for _ in range(200))]
    found = {
        "ranks": [base64.b64encode(piece).decode() for piece in ranks],
        "special": special,
        "texts": {text: theirs.encode(text, allowed_special="all") for text in texts},
    }
    assert [*ranks.values()] == [*range(len(ranks))]
    out = ROOT / "tests" / "data" / "tiktoken.json"
    out.write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")
    print(len(ranks), "ranks,", len(texts), "texts,", out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
