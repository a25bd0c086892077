"""Tokenizers of Hugging Face directories and GGUF files, with their chat templates and the tokens that end a turn."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rftjax.errors import UserError
from rftjax.text import gguf_tokenizer, rank_tokenizer, template
from rftjax.weights import gguf, hf
from rftjax.weights.directories import check_content

VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    rank_tokenizer.RANKS,
)
FILES = (*VOCABULARIES, "tokenizer_config.json")
TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja")
BOM = b"\xef\xbb\xbf"
MARK = "6e0b9f4c21"  # stands for an assistant's content while the text behind it is looked up
# Control tokens that end a turn or a message, which GGUF files have without a key that says so.
TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")


def load(path: str | os.PathLike[str]) -> Any:
    """Returns the fast tokenizer of a directory, hub name or GGUF file.

    A tokenizer.json is taken as it is: the automatic class rebuilds some as another kind. Tokens that other files of
    the directory add are added as transformers does. Without one, a tiktoken.model is read as Kimi K2's. Raises
    UserError where there is no tokenizer.
    """
    found = hf.locate(path)
    if _is_gguf(found):
        built, settings = gguf_tokenizer.build(gguf.read(found))
        return _fast(tokenizer_object=built, **settings)
    directory = found if found.is_dir() else found.parent
    if (directory / "tokenizer.json").exists():
        return _from_directory(directory)
    if not any((directory / name).exists() for name in VOCABULARIES):
        # The automatic class would make up an empty one from the configs.
        raise UserError(
            f"model.path={directory}: has no tokenizer.json and none of {', '.join(VOCABULARIES[1:])}; add them"
        )
    _check_files(directory)
    if (directory / rank_tokenizer.RANKS).exists():
        built, settings = rank_tokenizer.build(directory)
        return _fast(tokenizer_object=built, **settings)
    try:
        return _transformers().AutoTokenizer.from_pretrained(str(directory))
    except Exception as error:  # each tokenizer class fails in its own way
        raise UserError(
            f"model.path={directory}: has no tokenizer.json and no other tokenizer that loads"
            f" ({type(error).__name__}: {error}); where transformers and the packages that this tokenizer needs"
            " (sentencepiece, protobuf, ...) are installed, AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            " writes a tokenizer.json"
        ) from error


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether a model comes with a tokenizer: a directory of weights alone is a model too."""
    found = hf.locate(path)
    if _is_gguf(found):
        return gguf.read(found).metadata("tokenizer.ggml.tokens") is not None
    directory = found if found.is_dir() else found.parent
    return any((directory / name).exists() for name in FILES)


def vocabulary(tokenizer: Any) -> int:
    """Returns the largest id plus one: the ids of some tokenizers have gaps, so `len` is less."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_ids(ids: Iterable[int], vocab: int, what: str, tokenizer: Any = None) -> None:
    """Raises UserError where ids have no row in an embedding of `vocab` rows; `what` says where they come from."""
    for index in ids:
        if not 0 <= index < vocab:
            token = (
                tokenizer.convert_ids_to_tokens([index])[0] if tokenizer and index >= 0 else None
            )
            named = f"token {token!r} (id {index})" if token else f"id {index}"
            raise UserError(
                f"{what}: {named} is outside the model's embedding, vocab_size={vocab}; use the tokenizer files that"
                " belong to these weights, or give the model a row for each token (transformers'"
                " resize_token_embeddings)"
            )


def check_template(tokenizer: Any, vocab: int, path: str) -> None:
    """Raises UserError where the chat template itself writes a token that the model has no row for."""
    text = _rendered(tokenizer)
    if text:
        ids = tokenizer.encode(text, add_special_tokens=False)
        check_ids(ids, vocab, f"model.path={path}: the chat template", tokenizer)


def stop_tokens(path: str | os.PathLike[str], tokenizer: Any = None) -> tuple[int, ...]:
    """Returns the ids that end a turn: those of the generation config, model config, GGUF and tokenizer together.

    With a tokenizer also the token that its chat template writes behind an assistant's turn. Raises UserError for an
    id outside the embedding, naming file and field.
    """
    found = hf.locate(path)
    fields = hf.read_fields(found)
    sources: list[tuple[str, Any]] = []
    if _is_gguf(found):
        sources += _gguf_stops(gguf.read(found))
    else:
        directory = found if found.is_dir() else found.parent
        generation = directory / "generation_config.json"
        if generation.exists():
            value = hf.read_json(generation).get("eos_token_id")
            sources.append((f"{generation}: eos_token_id", value))
        sources.append((f"{directory / 'config.json'}: eos_token_id", fields.get("eos_token_id")))
    if tokenizer is not None:
        name = f"{path}: the tokenizer's eos_token {tokenizer.eos_token!r}"
        sources.append((name, tokenizer.eos_token_id))
        sources.append((f"{path}: the end of a turn in the chat template", end_of_turn(tokenizer)))
    stops: list[int] = []
    for source, value in sources:
        for index in value if isinstance(value, list) else [] if value is None else [value]:
            if isinstance(index, bool) or not isinstance(index, int):
                raise UserError(
                    f"model.path={source}={value!r}: must be the id of a token or a list of ids; correct it there"
                )
            check_ids([index], fields["vocab_size"], f"model.path={source}")
            stops.append(index)
    return tuple(dict.fromkeys(stops))


def generation(path: str | os.PathLike[str], tokenizer: Any = None) -> dict[str, Any]:
    """Returns the generation config of an export: the model's, with every token that ended a turn here."""
    fields = hf.read_generation(path)
    stops = list(stop_tokens(path, tokenizer))
    return fields | ({"eos_token_id": stops if len(stops) > 1 else stops[0]} if stops else {})


def end_of_turn(tokenizer: Any) -> int | None:
    """Returns the added token that the chat template writes behind an assistant's content, None without one."""
    text = _rendered(tokenizer)
    tail = text.rpartition(MARK)[2].lstrip() if MARK in text else ""
    ids = tokenizer.encode(tail, add_special_tokens=False) if tail else []
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def _rendered(tokenizer: Any) -> str:
    """Returns a short conversation by the chat template, "" where there is none or it refuses."""
    if not tokenizer.chat_template:
        return ""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
    try:
        return template.text(tokenizer, messages, False, None)
    except template.ChatTemplateError:  # rows are rendered and judged one by one later
        return ""


def _gguf_stops(file: gguf.File) -> list[tuple[str, Any]]:
    tokens = file.metadata("tokenizer.ggml.tokens") or []
    types = file.metadata("tokenizer.ggml.token_type") or []
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    found = [(f"{file.path}: {key}", file.metadata(key)) for key in keys]
    for token in TURN_ENDS:
        index = tokens.index(token) if token in tokens else -1
        if 0 <= index < len(types) and types[index] == gguf_tokenizer.CONTROL:
            found.append((f"{file.path}: {token}", index))
    return found


def _is_gguf(found: Path) -> bool:
    return found.suffix == ".gguf" and found.is_file()


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


def _check_files(directory: Path) -> None:
    """Raises UserError for a file that stands in for another one, or that transformers reads a byte order mark of."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", *TEMPLATES)
    for path in sorted(path for name in names for path in directory.glob(name)):
        check_content(path)
        with path.open("rb") as file:
            if file.read(len(BOM)) == BOM:
                raise UserError(
                    f"model.path={path}: begins with a byte order mark (BOM); save it again as UTF-8 without one"
                )


def _from_directory(directory: Path) -> Any:
    _check_files(directory)
    settings = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (directory / name).exists():
            settings[name] = hf.read_json(directory / name)
    longest = settings.get("tokenizer_config.json", {}).get("model_max_length")
    if longest is not None and not isinstance(longest, int | float):
        raise UserError(
            f"model.path={directory / 'tokenizer_config.json'}: model_max_length={longest!r} must be a number; correct"
            " or remove it"
        )
    kind = _transformers().PreTrainedTokenizerFast
    try:
        tokenizer = kind.from_pretrained(
            str(directory), clean_up_tokenization_spaces=False, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(
            f"model.path={directory}: tokenizer.json and the files beside it make no tokenizer"
            f" ({type(error).__name__}: {error}); download them again"
        ) from error
    _check_added(directory, settings, tokenizer)
    return tokenizer


def _check_added(directory: Path, settings: dict[str, Any], tokenizer: Any) -> None:
    """Raises UserError where a file that adds tokens gives one another id than tokenizer.json does."""
    file = "tokenizer_config.json"
    entries = settings.get(file, {}).get("added_tokens_decoder")
    if entries is None:  # transformers reads the older file then, and only then
        file = "added_tokens.json"
        added = settings.get(file, {})
    else:
        added = {entry["content"]: int(index) for index, entry in entries.items()}
    for token, index in added.items():
        actual = tokenizer.backend_tokenizer.token_to_id(token)
        if actual != index:
            raise UserError(
                f"model.path={directory}: {file} gives token {token!r} the id {index}, with tokenizer.json it has"
                f" {actual}; use the files of one version of this tokenizer"
            )
