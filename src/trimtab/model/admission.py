"""The check before a plan: may this folder be made smaller, and which of its files are the model?

What is refused here would be found hours later, as damage, as bad scores, or never. Each refusal says what to do, and
that was tried: a LoRA folder merged as it says, a tokenizer cut or an embedding enlarged, a head untied, is admitted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from trimtab import families
from trimtab.base.errors import InputError
from trimtab.model.configured import ties_embeddings
from trimtab.model.facts import ModelFacts, examine
from trimtab.model.files import CONFIG, model_files, read_json, weight_files
from trimtab.model.headers import Tensor, header_bytes, read_header
from trimtab.model.layouts import Layout

_CHUNK = 16 << 20
_ADAPTER = "adapter_config.json"
#: Tokens that text gets without holding them.
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class Admitted(NamedTuple):
    """A model that may be planned for: its facts, its files by name and where each lies, what lies beside them, and
    how its tensors are made of what the files store."""

    facts: ModelFacts
    files: dict[str, Path]
    left_out: list[str]
    layout: Layout


def admit(folder: str | Path) -> Admitted:
    """Returns what a folder holds of a model that trimtab can make smaller; reads headers, tokenizer, tied heads.

    Raises:
        InputError: it holds none; one sentence says why, and what to do.
    """
    folder = Path(folder)
    if folder.is_dir():
        _check_whole_model(folder)
    facts, layout = examine(folder)
    _check_embeddings(folder, facts, layout)
    return Admitted(facts, _located(folder), weight_files(folder).left_out, layout)


def _check_whole_model(folder: Path) -> None:
    """An adapter is none, nor is the folder above the snapshots of a cache."""
    has_config = (folder / CONFIG).is_file()
    if (folder / _ADAPTER).is_file():
        base = read_json(folder / _ADAPTER).get("base_model_name_or_path") or "its base model"
        if has_config:
            what = f"holds an adapter ({_ADAPTER}) beside a model; if the model has it merged, remove {_ADAPTER}, else"
        else:
            what = f"is an adapter of {base}, no model;"
        raise InputError(
            f"{folder}: {what} merge it first: AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()"
            f".save_pretrained(new_folder), and AutoTokenizer.from_pretrained(base).save_pretrained(new_folder)"
        )
    if not has_config and (snapshots := sorted(folder.glob(f"snapshots/*/{CONFIG}"))):
        raise InputError(f"{folder}: is a cache of the Hugging Face hub; give a snapshot: {snapshots[-1].parent}")


def _check_embeddings(folder: Path, facts: ModelFacts, layout: Layout) -> None:
    stored = {tensor.name: (path, tensor) for path, tensor in _tensors(folder)}
    found = {name: stored[layout.source_of(name)] for name in layout.pieces}
    family = families.named(facts.model_type)
    embedding, head = f"{family.embedding}.weight", f"{family.head}.weight"
    if embedding not in found:
        raise InputError(f"{folder}: lacks {embedding}, which a '{family.model_type}' has; download it again")
    rows = found[embedding][1].shape[0]
    if rows != facts.vocab_size:
        what = f"vocab_size is {facts.vocab_size}, and {embedding} has {rows} rows"
        raise InputError(f"{folder / CONFIG}: {what}; write {rows}, or download the weights that belong to it")
    _check_tokenizer(folder, rows)
    tied = head in found and ties_embeddings(read_json(folder / CONFIG))
    if tied and not _same(found[head], found[embedding]):
        raise InputError(
            f"{folder}: {head} has other numbers than {embedding}, and config.json says that they are one "
            f"(tie_word_embeddings): engines differ in which they use; write \"tie_word_embeddings\": false if the "
            f"head was trained, else load the model, set model.get_output_embeddings().weight = "
            f"model.get_input_embeddings().weight, and save it"
        )


def _tensors(folder: Path) -> Iterator[tuple[Path, Tensor]]:
    for name in weight_files(folder).names:
        for tensor in read_header(folder / name):
            yield folder / name, tensor


def _same(one: tuple[Path, Tensor], other: tuple[Path, Tensor]) -> bool:
    """Whether two tensors are equal byte for byte; reads no further than the first difference."""
    (path, tensor), (other_path, second) = one, other
    if (tensor.dtype, tensor.shape) != (second.dtype, second.shape):
        return False
    with path.open("rb") as file, other_path.open("rb") as other_file:
        file.seek(header_bytes(path) + tensor.begin)
        other_file.seek(header_bytes(other_path) + second.begin)
        left = tensor.end - tensor.begin
        while left > 0:
            size = min(_CHUNK, left)
            if file.read(size) != other_file.read(size):
                return False
            left -= size
    return True


def _check_tokenizer(folder: Path, rows: int) -> None:
    """Refuses a token that text can have and the embedding lacks: its row would be another tensor's memory.

    A special token of no role, which stands only where somebody writes it out, is let pass: Gemma 3's text models have
    their siblings' token of an image.
    """
    config = _optional(folder / "tokenizer_config.json")
    named = {**config, **_optional(folder / "special_tokens_map.json")}
    roles = {_text(named.get(role)) for role in _ROLES}
    template = str(config.get("chat_template", ""))
    if (folder / "chat_template.jinja").is_file():
        template += (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    for number, (text, special) in sorted(_vocabulary(folder, config).items()):
        if number >= rows and (not special or text in roles or text in template):
            raise InputError(
                f"{folder}: the tokenizer has token {number} ({text!r}), and the embedding only {rows} rows; "
                f"remove the token from the tokenizer's files, or, if the model was meant to have it, add its row: "
                f"model.resize_token_embeddings(len(tokenizer)), and save both"
            )


def _vocabulary(folder: Path, config: dict[str, Any]) -> dict[int, tuple[str, bool]]:
    """The tokenizer's tokens by id: text, and whether it is special."""
    found: dict[int, tuple[str, bool]] = {}
    whole = _optional(folder / "tokenizer.json")
    vocabulary = (whole.get("model") or {}).get("vocab") or _optional(folder / "vocab.json")
    if isinstance(vocabulary, dict):
        found |= {number: (text, False) for text, number in vocabulary.items() if isinstance(number, int)}
    else:  # Unigram's list of [text, score]
        found |= {number: (str(entry[0]), False) for number, entry in enumerate(vocabulary)}
    added = [(token.get("id"), token) for token in whole.get("added_tokens") or []]
    added += [(int(number), token) for number, token in (config.get("added_tokens_decoder") or {}).items()]
    if not whole:
        added += [(number, {"content": text}) for text, number in _optional(folder / "added_tokens.json").items()]
    for number, token in added:
        if isinstance(number, int):
            found[number] = (_text(token), bool(token.get("special")))
    return found


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _text(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _located(folder: Path) -> dict[str, Path]:
    """The model's files by name, and where their content lies: the hub's cache links each into `../../blobs`.

    Raises:
        InputError: a link leads elsewhere: it would bring a file that is not the model's into the store.
    """
    root = folder.resolve()
    allowed = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    found = {name: (root / name).resolve() for name in model_files(folder)}
    for name, path in found.items():
        if not any(path.is_relative_to(place) for place in allowed):
            raise InputError(f"{folder / name}: is a link that leaves the folder, to {path}; replace it by a copy")
    return found
