"""Tokenizers that a file of tiktoken describes: a rank for each piece of bytes, merged by the lowest rank (Kimi K2)."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from rftjax.errors import UserError
from rftjax.weights.directories import check_content, read_json

RANKS = "tiktoken.model"
# Kimi K2's pieces: Chinese characters by themselves; words with their ending, of which the last part is lower-case or
# all is upper-case; numbers of three digits; signs with the line breaks behind them; white space.
_CHINESE = r"\p{Han}"
_UPPER = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^{_CHINESE}]]"
_LOWER = rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^{_CHINESE}]]"
_BEFORE, _BEHIND = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PIECES = "|".join(
    [
        rf"[{_CHINESE}]+",
        f"{_BEFORE}{_UPPER}*{_LOWER}+{_BEHIND}",
        f"{_BEFORE}{_UPPER}+{_LOWER}*{_BEHIND}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
RESERVED = 256  # tokens behind the ranks, of which tokenizer_config.json names some
CLASS = "TikTokenTokenizer"
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def build(directory: Path) -> tuple[Any, dict[str, Any]]:
    """Returns a `tokenizers.Tokenizer` and the special tokens and chat template of a directory.

    The code that comes with such a tokenizer is not run. Raises UserError for the file of another one.
    """
    settings = read_json(directory / "tokenizer_config.json")
    if settings.get("tokenizer_class") != CLASS:
        raise UserError(
            f"model.path={directory}: {RANKS} is read with tokenizer_class {CLASS} (Kimi K2) in tokenizer_config.json,"
            f" not with {settings.get('tokenizer_class')!r}; add the tokenizer.json of this model"
        )
    ranks = _read(directory / RANKS)
    built = _tokenizer(ranks)
    names = {
        int(index): entry for index, entry in (settings.get("added_tokens_decoder") or {}).items()
    }
    _add(directory, built, len(ranks), names)
    found = {name: _content(settings[name]) for name in SPECIAL if settings.get(name)}
    template = directory / "chat_template.jinja"
    if template.exists():
        check_content(template)
        found["chat_template"] = template.read_text(encoding="utf-8")
    elif settings.get("chat_template"):
        found["chat_template"] = settings["chat_template"]
    return built, found


def _read(file: Path) -> dict[bytes, int]:
    check_content(file)
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"model.path={file}: line {number} is no piece in base64 and its rank ({error}); download it again"
            ) from error
    single = all(bytes([value]) in ranks for value in range(256))
    if sorted(ranks.values()) != list(range(len(ranks))) or not single:
        raise UserError(
            f"model.path={file}: its {len(ranks)} ranks are not 0, 1, 2, ..., or a byte has none; download it again"
        )
    return ranks


def _tokenizer(ranks: dict[bytes, int]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = _byte_letters()
    vocab = {_written(piece, letters): rank for piece, rank in ranks.items()}
    # Every pair of pieces that make a piece, by the rank of what they make.
    merges = []
    for piece, rank in ranks.items():
        for cut in range(1, len(piece)):
            first, second = ranks.get(piece[:cut]), ranks.get(piece[cut:])
            if first is not None and second is not None:
                merges.append((rank, first, second, piece[:cut], piece[cut:]))
    pairs = [
        (_written(left, letters), _written(right, letters)) for *_, left, right in sorted(merges)
    ]
    built = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    built.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    built.decoder = decoders.ByteLevel()
    return built


def _written(piece: bytes, letters: list[str]) -> str:
    return "".join(letters[value] for value in piece)


def _byte_letters() -> list[str]:
    """Returns the letter that byte-level models write for each byte: itself where it is printable, else one of those
    from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    return [
        chr(value) if value in printable else chr(256 + others.index(value)) for value in range(256)
    ]


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


def _add(directory: Path, built: Any, first: int, names: dict[int, Any]) -> None:
    from tokenizers import AddedToken

    outside = [index for index in names if not first <= index < first + RESERVED]
    if outside:
        raise UserError(
            f"model.path={directory}: tokenizer_config.json gives {_content(names[outside[0]])!r} the id {outside[0]},"
            f" {RANKS} leaves those from {first} to {first + RESERVED - 1}; use the files of one version"
        )
    texts = {
        index: _content(names[index]) if index in names else f"<|reserved_token_{index}|>"
        for index in range(first, first + RESERVED)
    }
    built.add_tokens([AddedToken(text, special=True, normalized=False) for text in texts.values()])
    for index, text in texts.items():
        if built.token_to_id(text) != index:
            raise UserError(
                f"model.path={directory}: tokenizer_config.json names {text!r} twice, or as a piece of {RANKS}; use the"
                " files of one version"
            )
