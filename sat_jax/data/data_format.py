"""Settings of the input format: how documents are read and how conversations are encoded."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

from sat_jax.errors import UserError

Format: TypeAlias = Literal["text", "messages", "sharegpt", "alpaca", "prompt_completion"]
LossOn: TypeAlias = Literal["all", "last"]
TooLong: TypeAlias = Literal["drop", "cut_end", "refuse"]

_CONVERSATIONS = tuple(name for name in get_args(Format) if name != "text")
_FORMATS_OF = {  # the formats that use a setting; all formats use a setting that is not listed
    "text_field": ("text",),
    "min_document_tokens": ("text",),
    "prompt_field": ("prompt_completion",),
    "completion_field": ("prompt_completion",),
    "chat_template": _CONVERSATIONS,
    "system": _CONVERSATIONS,
    "loss_on": _CONVERSATIONS,
    "too_long": _CONVERSATIONS,
}

# What `too_long` does to an example that is longer than a row.
TOO_LONG_ACTIONS: Mapping[TooLong, str] = {
    "drop": "dropped",
    "cut_end": "truncated, or dropped if no answer remains",
    "refuse": "refused",
}


@dataclass(frozen=True)
class DataFormat:
    """The format of the documents: plain text, or conversations with a loss on the answers only.

    The fields are documented in `config.DataConfig`, which has them too. Their names and values are
    part of the fingerprint of prepared data. Raises `UserError` for a setting that the format does
    not use.
    """

    format: Format = "text"
    text_field: str = "text"
    min_document_tokens: int | None = None
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    chat_template: str = "model"
    system: str | None = None
    loss_on: LossOn = "all"
    too_long: TooLong = "drop"

    def __post_init__(self) -> None:
        for name, choices in (("format", Format), ("loss_on", LossOn), ("too_long", TooLong)):
            if getattr(self, name) not in get_args(choices):
                accepted = ", ".join(get_args(choices))
                raise UserError(f"data.{name} {getattr(self, name)!r}; accepted: {accepted}")
        for field in fields(self):
            value, formats = getattr(self, field.name), _FORMATS_OF.get(field.name)
            if formats and value != field.default and self.format not in formats:
                raise UserError(
                    f"data.{field.name} {value!r} has no effect with data.format {self.format!r};"
                    f" it is used by {', '.join(formats)}"
                )

    @classmethod
    def from_settings(cls, settings: Any) -> "DataFormat":
        """Return the format described by the attributes of `settings` that have these names."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    @property
    def is_text(self) -> bool:
        """Whether documents are plain text, with a loss on every token."""
        return self.format == "text"
