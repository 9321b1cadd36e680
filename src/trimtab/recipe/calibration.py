"""The section `calibrate`: the text that activations are measured on."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from trimtab.base.schema_errors import in_yaml
from trimtab.base.user_document import UserDocument
from trimtab.recipe.fields import Count


class Source(UserDocument):
    """One source of calibration text, and its share of the samples."""

    text: str
    """Where it is from: "builtin", the path of a .txt, .jsonl, .json or .csv file, or a dataset: hf:owner/name on the
    Hugging Face hub, or hf: and a local folder."""
    config: str | None = None
    """The configuration of a dataset, such as its language; the only one it has if absent."""
    split: str = "train"
    """The split of a dataset."""
    field: str = "text"
    """The column of a dataset that holds its text, or the messages of a conversation."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Samples are shared out over the sources in proportion to it."""

    @property
    def dataset(self) -> str | None:
        """What follows `hf:`, a name on the hub or a local folder; None for other sources."""
        return self.text.removeprefix("hf:") if self.text.startswith("hf:") else None

    @property
    def title(self) -> str:
        """The source in messages and tables, as 'hf:owner/name config train' or 'notes.txt'."""
        parts = (self.text, self.config, self.split) if self.dataset is not None else (self.text,)
        return " ".join(part for part in parts if part)

    @model_validator(mode="before")
    @classmethod
    def _is_a_mapping(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"is a text without its field; write {in_yaml({'text': value})}")
        return value

    @model_validator(mode="after")
    def _columns_belong_to_datasets(self) -> Source:
        plain = (self.config, self.split, self.field) == (None, "train", "text")
        if self.dataset is None and not plain:
            raise ValueError("has config, split or field, which only a dataset has; write text: 'hf:owner/name'")
        return self


class Calibration(UserDocument):
    """The data that activations are measured on."""

    samples: Count = 8
    """How many windows of text are measured."""
    length: Annotated[int, Field(ge=8)] = 512
    """Length of a window, in tokens."""
    text: Annotated[
        Annotated[str, Tag("one")] | Annotated[tuple[Source, ...], Tag("mix")],
        Discriminator(lambda value: "mix" if isinstance(value, list | tuple | dict) else "one"),
    ] = "builtin"
    """Where the text is from: one source, written as the `text` of a source is, or a list of sources to mix."""
    seed: int = 0
    """Chooses the windows; the same seed chooses the same."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources, in the order of the recipe; a single text is one of weight 1."""
        return (Source(text=self.text),) if isinstance(self.text, str) else self.text

    @model_validator(mode="after")
    def _sources_differ(self) -> Calibration:
        if not self.sources:
            raise ValueError("names no source of text; write text: builtin, or a list of sources")
        seen = set()
        for source in self.sources:
            if source.dataset == "":
                raise ValueError("names no dataset after 'hf:'; write hf:owner/name, or hf: and a folder")
            key = source.model_copy(update={"weight": 1.0})
            if key in seen:  # each would draw its windows without regard to the other's
                raise ValueError(f"names '{source.title}' twice; write it once, with a larger weight")
            seen.add(key)
        return self
