"""Documents of a named dataset, read as a stream: of a large one no more is fetched than is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trimtab.errors import InputError
from trimtab.recipe import Source
from trimtab.runtime import documents

#: Rows that wait to be drawn; with the order of a dataset's files, also drawn, it makes the stream a mixture.
SHUFFLE_BUFFER = 1000


def stream(source: Source, tokenizer: Any, seed: int) -> Iterator[str]:
    """Yields the documents of a dataset in an order that the seed draws; rows without text are passed over.

    Raises:
        InputError: the dataset, its config, its split or its field does not exist, it cannot be reached or read, or
            the field holds neither text nor messages.
    """
    for row in _rows(source, seed):
        if source.field not in row:
            raise InputError(
                f"calibrate.text: '{source.title}' has no field '{source.field}'; write field: one of {', '.join(row)}"
            )
        value = row[source.field]
        try:
            document = documents.document(value, tokenizer, row.get("tools")) if value is not None else ""
        except ValueError as error:
            raise InputError(f"calibrate.text: field '{source.field}' of '{source.title}' {error}") from None
        if document.strip():
            yield document


def _rows(source: Source, seed: int) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(
            source.dataset, source.config, split=source.split, streaming=True, trust_remote_code=False
        )
        yield from rows.shuffle(seed=seed % 2**64, buffer_size=SHUFFLE_BUFFER)  # NumPy knows no negative seed
    except Exception as error:  # readers, parsers and network clients each raise their own
        said = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"calibrate.text: the dataset '{source.title}' cannot be loaded: {said}; write hf:owner/name of a dataset "
            f"that needs no code of its own, with its config and split, or hf: and a folder that is there"
        ) from None
