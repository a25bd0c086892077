"""Tokenizers of Hugging Face directories and GGUF files, with their chat templates."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rftjax import gguf, hf
from rftjax.errors import UserError

# How each `tokenizer.ggml.pre` splits text before byte-pair merges.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (GPT2,),
    "llama-bpe": (WORDS.format(digits="{1,3}"),),
    "qwen2": (WORDS.format(digits=""),),
    "smollm": (r"\p{N}", GPT2),
}
FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
CONTROL, USER_DEFINED = 3, 4  # token types of the GGUF format
SPECIAL = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def load(path: str | os.PathLike[str]) -> Any:
    """Returns the fast tokenizer of a directory, hub name or GGUF file.

    A tokenizer.json is taken as it is: the automatic class rebuilds some as another kind.
    Raises ValueError where there is no tokenizer.
    """
    found = hf.locate(path)
    if found.suffix == ".gguf":
        return from_gguf(gguf.read(found))
    directory = found if found.is_dir() else found.parent
    if (directory / "tokenizer.json").exists():
        return _from_directory(directory)
    if not any((directory / name).exists() for name in FILES):
        # The automatic class would make up an empty one from the config.
        raise UserError(
            f"model.path={directory}: has no tokenizer.json and none of {', '.join(FILES[1:])}; add them"
        )
    try:
        return _transformers().AutoTokenizer.from_pretrained(str(directory))
    except Exception as error:  # each tokenizer class fails in its own way
        raise UserError(
            f"model.path={directory}: has no tokenizer.json and no other tokenizer that loads"
            f" ({type(error).__name__}: {error})"
        ) from error


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether a model comes with a tokenizer: a directory of weights alone is a model too."""
    found = hf.locate(path)
    if found.suffix == ".gguf":
        return gguf.read(found).metadata("tokenizer.ggml.tokens") is not None
    directory = found if found.is_dir() else found.parent
    return any((directory / name).exists() for name in FILES)


def stop_tokens(path: str | os.PathLike[str], tokenizer: Any = None) -> tuple[int, ...]:
    """Returns the ids that end a turn: the generation config's, the tokenizer's or the config's."""
    found = hf.locate(path)
    generation = found / "generation_config.json"
    ids = hf.read_json(generation).get("eos_token_id") if generation.exists() else None
    if ids is None and tokenizer is not None:
        ids = tokenizer.eos_token_id
    if ids is None:
        ids = hf.read_fields(found).get("eos_token_id")
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (int(ids),)


def _transformers() -> Any:
    # It takes seconds to import, and tells everybody who has no PyTorch that models need it.
    switch = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        import transformers
    finally:
        os.environ.pop(switch) if before is None else os.environ.update({switch: before})
    return transformers


def _fast(**settings: Any) -> Any:
    # Decoding is the inverse of encoding here: no spaces are tidied away.
    return _transformers().PreTrainedTokenizerFast(clean_up_tokenization_spaces=False, **settings)


def _from_directory(directory: Path) -> Any:
    settings: dict[str, Any] = {}
    if (directory / "tokenizer_config.json").exists():
        found = hf.read_json(directory / "tokenizer_config.json")
        for name in (*SPECIAL, "additional_special_tokens", "extra_special_tokens"):
            if found.get(name):
                settings[name] = _text(found[name])
        for name in ("chat_template", "model_max_length", "padding_side"):
            if found.get(name) is not None:
                settings[name] = found[name]
    if isinstance(settings.get("chat_template"), list):
        templates = settings["chat_template"]
        settings["chat_template"] = {item["name"]: item["template"] for item in templates}
    if (directory / "chat_template.jinja").exists():
        template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
        settings["chat_template"] = template
    try:
        return _fast(tokenizer_file=str(directory / "tokenizer.json"), **settings)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"{directory / 'tokenizer.json'}: not a tokenizer ({error})") from error


def _text(token: Any) -> Any:
    # tokenizer_config.json writes a special token as text or as the fields of an AddedToken.
    if isinstance(token, list):
        return [_text(item) for item in token]
    if isinstance(token, dict) and "content" in token:
        return token["content"]
    return token


def from_gguf(file: gguf.File) -> Any:
    """Returns the tokenizer that a GGUF file's metadata describe; refuses kinds not implemented."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    kind = file.metadata("tokenizer.ggml.model")
    pre = file.metadata("tokenizer.ggml.pre") or "default"
    if kind != "gpt2" or pre not in SPLITS:
        raise UserError(
            f"model.path={file.path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not"
            f" implemented; rftjax reads byte-pair tokenizers ('gpt2') with {', '.join(SPLITS)}"
        )
    tokens = file.metadata("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in file.metadata("tokenizer.ggml.merges")]
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        ignore_merges=pre == "llama-bpe",
    )
    built = Tokenizer(model)
    if pre == "qwen2":
        from tokenizers import normalizers

        built.normalizer = normalizers.NFC()
    built.pre_tokenizer = _pre_tokenizer(pre)
    built.decoder = decoders.ByteLevel()
    types = file.metadata("tokenizer.ggml.token_type") or []
    for token, token_type in zip(tokens, types, strict=False):
        if token_type in (CONTROL, USER_DEFINED):
            special = token_type == CONTROL
            built.add_tokens([AddedToken(token, special=special, normalized=False)])
    settings: dict[str, Any] = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = file.metadata(f"tokenizer.ggml.{theirs}_token_id")
        if index is not None:
            settings[f"{ours}_token"] = tokens[index]
    if file.metadata("tokenizer.ggml.add_bos_token") and "bos_token" in settings:
        bos = settings["bos_token"]
        built.post_processor = _prepend(bos, file.metadata("tokenizer.ggml.bos_token_id"))
    template = file.metadata("tokenizer.chat_template")
    if template:
        settings["chat_template"] = template
    return _fast(tokenizer_object=built, **settings)


def _pre_tokenizer(pre: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, byte_level])


def _prepend(bos: str, index: int) -> Any:
    from tokenizers import processors

    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, index)]
    )
