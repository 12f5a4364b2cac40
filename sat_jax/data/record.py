"""A JSON object with its location, whose fields are checked when they are read."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from sat_jax.errors import UserError


class Record(NamedTuple):
    """A JSON object and its location. Methods raise `UserError` for a field of another type."""

    fields: Mapping[str, Any]
    origin: str

    def value(self, name: str) -> Any:
        """Return the value of a required field."""
        if name not in self.fields:
            names = ", ".join(list(self.fields)[:10]) or "no fields"
            raise UserError(f"{self.origin}: no field {name!r} (it has {names})")
        return self.fields[name]

    def text(self, name: str) -> str:
        """Return the text of a required field."""
        text = self.value(name)
        if not isinstance(text, str):
            raise UserError(f"{self.origin}: field {name!r} is {json_type(text)}, not a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can escape a lone surrogate
            location = f"character {error.start} of field {name!r}"
            raise UserError(f"{self.origin}: lone surrogate at {location}") from error
        return text

    def optional_text(self, name: str) -> str:
        """Return the text of a field, or "" if the field is missing or null."""
        return "" if self.fields.get(name) is None else self.text(name)

    def has_value(self, name: str) -> bool:
        """Return whether a field is not missing, null or empty, also as JSON in a string."""
        value = self.fields.get(name)
        is_empty = isinstance(value, (str, list, dict)) and value in ("", "[]", "{}", [], {})
        return not (value is None or is_empty)

    def fields_besides(self, names: Collection[str]) -> list[str]:
        """Return the names of the fields that have a value and are not in `names`, in order."""
        return [name for name in self.fields if name not in names and self.has_value(name)]

    def array(self, name: str) -> list[Any]:
        """Return the items of a required field that is a list."""
        items = self.value(name)
        if not isinstance(items, list):
            raise UserError(f"{self.origin}: field {name!r} is {json_type(items)}, not an array")
        return items

    def objects(self, name: str) -> "list[Record]":
        """Return the objects in a field that is a list of objects."""
        records = []
        for number, item in enumerate(self.array(name), 1):
            if not isinstance(item, dict):
                raise UserError(
                    f"{self.origin}: item {number} of {name!r} is {json_type(item)}, not an object"
                )
            records.append(Record(item, f"{self.origin}, item {number} of {name!r}"))
        return records


def json_type(value: Any) -> str:
    """Return the type of a JSON value in words."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
