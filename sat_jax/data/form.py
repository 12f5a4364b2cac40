"""What a line of the sources holds, and how a conversation becomes a segment: settings only."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

from sat_jax.errors import UserError

Format: TypeAlias = Literal["text", "messages", "sharegpt", "alpaca", "prompt_completion"]
LossOn: TypeAlias = Literal["all", "last"]
TooLong: TypeAlias = Literal["drop", "cut_end", "refuse"]

_EXAMPLES = tuple(name for name in get_args(Format) if name != "text")
_OF = {  # which formats a setting says something to
    "text_field": ("text",),
    "prompt_field": ("prompt_completion",),
    "completion_field": ("prompt_completion",),
    "chat_template": _EXAMPLES,
    "system": _EXAMPLES,
    "loss_on": _EXAMPLES,
    "too_long": _EXAMPLES,
}


# What becomes of an example that is longer than a row.
DONE: Mapping[TooLong, str] = {
    "drop": "dropped",
    "cut_end": "cut short, or dropped where no answer is left",
    "refuse": "refused",
}


@dataclass(frozen=True)
class Form:
    """Documents of text, or examples: conversations whose answers alone bear loss.

    `config.DataConfig` has the same names and says what they mean. Raises `UserError` for a setting
    that says nothing to the format.
    """

    format: Format = "text"
    text_field: str = "text"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    chat_template: str = "model"
    system: str | None = None
    loss_on: LossOn = "all"
    too_long: TooLong = "drop"

    def __post_init__(self) -> None:
        for name, names in (("format", Format), ("loss_on", LossOn), ("too_long", TooLong)):
            if getattr(self, name) not in get_args(names):
                accepted = ", ".join(get_args(names))
                raise UserError(f"data.{name} {getattr(self, name)!r}; accepted: {accepted}")
        for field in fields(self):
            value, formats = getattr(self, field.name), _OF.get(field.name, get_args(Format))
            if value != field.default and self.format not in formats:
                raise UserError(
                    f"data.{field.name} {value!r} says nothing to data.format {self.format!r};"
                    f" it is for {', '.join(formats)}"
                )

    @classmethod
    def of(cls, settings: Any) -> "Form":
        """The form among `settings`, anything with attributes of these names."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    @property
    def text(self) -> bool:
        """Whether documents are plain text, every token of which is learnt."""
        return self.format == "text"
