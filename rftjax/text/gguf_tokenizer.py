"""Tokenizers that a GGUF file's metadata describe, as llama.cpp reads them (its src/llama-vocab.cpp)."""

from __future__ import annotations

from typing import Any

from rftjax.errors import UserError
from rftjax.weights import gguf

# How each `tokenizer.ggml.pre` splits text before byte-pair merges.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}"),
    "gpt-2": (GPT2,),
    "llama-bpe": (WORDS.format(digits="{1,3}"),),
    "qwen2": (WORDS.format(digits=""),),
    "smaug-bpe": (WORDS.format(digits="{1,3}"),),
    "smollm": (r"\p{N}", GPT2),
}
# Other names of the same.
ALIASES = {
    "llama-bpe": (
        *("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        "jina-v5-nano",
    ),
    "qwen2": ("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"),
    "smaug-bpe": ("dbrx",),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "gpt-2": (
        *("phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0"),
        *("mellum", "modern-bert", "mpt", "olmo", "jais", "trillion", "exaone4"),
    ),
}
NAMES = {alias: name for name, aliases in ALIASES.items() for alias in aliases}
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5  # token types of the GGUF format
SPACE = "▁"  # what sentencepiece writes for a space
IDS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unk": 0}  # where the file does not say


def build(file: gguf.File) -> tuple[Any, dict[str, Any]]:
    """Returns a `tokenizers.Tokenizer` and the special tokens and chat template of a file.

    Unused tokens at the end, which pad the embedding, are left out. Raises UserError for kinds that are not
    implemented and for metadata that do not fit together.
    """
    kind = file.metadata("tokenizer.ggml.model")
    tokens = file.metadata("tokenizer.ggml.tokens") or []
    types = file.metadata("tokenizer.ggml.token_type") or [1] * len(tokens)
    _check_tokens(file, tokens, types)
    ids = special_ids(file)
    used = len(tokens)
    while used and types[used - 1] == UNUSED:
        used -= 1
    tokens, types = tokens[:used], types[:used]
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"model.path={file.path}: tokenizer.ggml.model={kind!r} is not implemented; rftjax reads 'gpt2' (byte"
            " pairs) and 'llama' (sentencepiece): use the model's Hugging Face directory"
        )
    try:
        built, adds_bos = (_byte_pairs if kind == "gpt2" else _sentencepiece)(file, tokens)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(
            f"model.path={file.path}: tokenizer.ggml.tokens and .merges make no tokenizer ({error}); use another"
            " file, or the model's Hugging Face directory"
        ) from error
    _add_special(built, tokens, types)
    settings: dict[str, Any] = {
        f"{name}_token": tokens[index] for name, index in ids.items() if index < used
    }
    said = file.metadata("tokenizer.ggml.add_bos_token")
    before = ids.get("bos") if (adds_bos if said is None else said) else None
    after = ids.get("eos") if file.metadata("tokenizer.ggml.add_eos_token") else None
    if before is not None or after is not None:
        built.post_processor = _surround(tokens, before, after)
    if template := file.metadata("tokenizer.chat_template"):
        settings["chat_template"] = template
        named = {
            name: file.metadata(f"tokenizer.chat_template.{name}")
            for name in file.metadata("tokenizer.chat_templates") or ()
        }
        if any(named.values()):
            settings["chat_template"] = {"default": template} | {
                k: v for k, v in named.items() if v
            }
    return built, settings


def special_ids(file: gguf.File) -> dict[str, int]:
    """Returns the ids of bos, eos, pad and unk; refuses those that the file has no token for."""
    count = len(file.metadata("tokenizer.ggml.tokens") or ())
    found = {}
    for name, theirs in IDS.items():
        index = file.metadata(f"tokenizer.ggml.{theirs}_token_id")
        if index is None and file.metadata("tokenizer.ggml.model") == "llama":
            index = SENTENCEPIECE_IDS.get(name)
            index = index if index is not None and index < count else None
        if index is not None:
            check_id(file, theirs, index, count)
            found[name] = index
    return found


def check_id(file: gguf.File, name: str, index: int, count: int) -> None:
    """Raises UserError for a special token's id that the file has no token for."""
    if not 0 <= index < count:
        raise UserError(
            f"model.path={file.path}: tokenizer.ggml.{name}_token_id={index} is no id of its {count} tokens; correct"
            " the file with llama.cpp's gguf-set-metadata, or use the model's Hugging Face directory"
        )


def _check_tokens(file: gguf.File, tokens: list[str], types: list[int]) -> None:
    if not tokens:
        raise UserError(
            f"model.path={file.path}: has no tokenizer.ggml.tokens; use a file with a tokenizer, or the model's"
            " Hugging Face directory"
        )
    if len(types) != len(tokens):
        raise UserError(
            f"model.path={file.path}: {len(types)} entries of tokenizer.ggml.token_type for {len(tokens)} tokens;"
            " make the file again"
        )
    if len(set(tokens)) != len(tokens):
        first: dict[str, int] = {}
        twice = next(i for i, token in enumerate(tokens) if first.setdefault(token, i) != i)
        raise UserError(
            f"model.path={file.path}: tokenizer.ggml.tokens has {tokens[twice]!r} at {first[tokens[twice]]} and"
            f" {twice}; make the file again"
        )


def _byte_pairs(file: gguf.File, tokens: list[str]) -> tuple[Any, bool]:
    """Returns the tokenizer and whether it begins a text with bos unless the file says otherwise."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    said = file.metadata("tokenizer.ggml.pre") or "default"
    pre = NAMES.get(said, said)
    if pre not in SPLITS:
        raise UserError(
            f"model.path={file.path}: tokenizer.ggml.pre={said!r} is not implemented; rftjax reads"
            f" {', '.join(sorted({*SPLITS, *NAMES}))}: use the model's Hugging Face directory"
        )
    merges = file.metadata("tokenizer.ggml.merges")
    if merges is None:
        raise UserError(
            f"model.path={file.path}: has no tokenizer.ggml.merges, which byte-pair tokenizers need; make the file"
            " again with llama.cpp's convert_hf_to_gguf.py, or use the model's Hugging Face directory"
        )
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ", 1)) for merge in merges],
        ignore_merges=pre == "llama-bpe",
    )
    built = Tokenizer(model)
    if pre == "qwen2":
        built.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    built.decoder = decoders.ByteLevel()
    return built, pre == "llama-bpe"


def _sentencepiece(file: gguf.File, tokens: list[str]) -> tuple[Any, bool]:
    """Returns the same of sentencepiece's byte pairs, which merge the pair whose token scores best."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.metadata("tokenizer.ggml.scores")
    if scores is None or len(scores) < len(tokens):
        raise UserError(
            f"model.path={file.path}: tokenizer.ggml.scores are not there for all {len(tokens)} tokens, and"
            " sentencepiece tokenizers need them; make the file again with llama.cpp's convert_hf_to_gguf.py"
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = special_ids(file).get("unk")
    model = models.BPE(
        vocab=vocab,
        merges=_merges_by_score(vocab, scores),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    built = Tokenizer(model)
    prefix = file.metadata("tokenizer.ggml.add_space_prefix")
    escape: Any = normalizers.Replace(" ", SPACE)
    parts: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix is None or prefix:
        escape = normalizers.Sequence([normalizers.Prepend(SPACE), escape])
        parts.append(decoders.Strip(" ", 1, 0))
    built.normalizer = escape
    built.decoder = decoders.Sequence(parts)
    return built, True


def _merges_by_score(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Returns every pair of tokens that make a token, the best score first, and of one score the lower id."""
    ranked = []
    for token, index in vocab.items():
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair[0] in vocab and pair[1] in vocab:
                ranked.append((-scores[index], index, vocab[pair[0]], pair))
    return [pair for *_, pair in sorted(ranked)]


def _add_special(built: Any, tokens: list[str], types: list[int]) -> None:
    from tokenizers import AddedToken

    # One call: each makes the matching of all of them again.
    added = [
        AddedToken(token, special=token_type != USER_DEFINED, normalized=False)
        for token, token_type in zip(tokens, types, strict=True)
        if token_type in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    built.add_tokens(added)


def _surround(tokens: list[str], before: int | None, after: int | None) -> Any:
    from tokenizers import processors

    left = [] if before is None else [tokens[before]]
    right = [] if after is None else [tokens[after]]
    single = [*left, "$A", *right]
    second = [f"{part}:1" for part in [*left, "$B", *right]]
    ids = [(tokens[index], index) for index in (before, after) if index is not None]
    return processors.TemplateProcessing(single=single, pair=[*single, *second], special_tokens=ids)
