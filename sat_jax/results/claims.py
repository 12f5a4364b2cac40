"""Numbers in the sentences of a document, which must be in a generated table.

Checked are numbers with a standard error, percentages, factors (`1.2×`) and decimal fractions,
without their signs. In `4.2 and 8.8 %` the unit counts for both. A percentage of a table may also
stand as its complement: 83 % of the FLOPs are 17 % fewer. Not read: code, links and comments.

    <!-- not from rows: 0.5 %, 1.50× -->

in a paragraph accepts numbers that no table has, in that paragraph.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from sat_jax.results.documents import TABLE

_DIGITS = r"(?>\d+(?:,\d{3})*(?:\.\d+)?)(?!\w|\.\d)"
_NUMBER = re.compile(
    rf"(?<![\w.:/])(?<!\w-)({_DIGITS})(?:\s*([%×]))?(?:\s*±\s*({_DIGITS})(?:\s*([%×]))?)?"
)
_SAME_UNIT = re.compile(r"\s*(?:,|,?\s+(?:and|or|to)|→|instead of)\s*")
_FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_NOT_READ = re.compile(r"`[^`]*`|\]\([^)]*\)|https?://\S+|<!--.*?-->", re.DOTALL)
_ESCAPE = re.compile(r"<!-- not from rows: (.*?) -->", re.DOTALL)
_PARAGRAPH = re.compile(r"(?:^.*\S.*\n?)+", re.MULTILINE)


class Number(NamedTuple):
    """`error` is empty without a standard error; `unit` is `%`, `×` or empty."""

    value: str
    error: str
    unit: str

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit == "%" else self.unit
        return " ± ".join(part + unit for part in (self.value, self.error) if part)


def unsupported(text: str, *quoted: str) -> list[tuple[int, str]]:
    """Return the number of the line and a message for each number in a sentence that no generated
    table of the document or of those that it quotes has, and for each exception that accepts
    nothing."""
    tables = [match["text"] for part in (text, *quoted) for match in TABLE.finditer(part)]
    known = _known("\n".join(tables))
    findings = []
    prose = _FENCE.sub(_blank, TABLE.sub(_blank, text))
    for paragraph in _PARAGRAPH.finditer(prose):
        start, lines = paragraph.start(), paragraph[0]
        excepted = {
            number: start + match.start()
            for match in _ESCAPE.finditer(lines)
            for number, _ in _numbers(match[1])
        }
        missing = [
            (number, start + position)
            for number, position in _numbers(_NOT_READ.sub(_blank, lines))
            if (number.error or number.unit or "." in number.value) and number not in known
        ]
        findings += [
            (
                position,
                f"{number} is in no generated table of the document; accepted: a number of a table,"
                f" or <!-- not from rows: {number} --> in the paragraph",
            )
            for number, position in missing
            if number not in excepted
        ]
        unused = excepted.keys() - {number for number, _ in missing}
        findings += [
            (excepted[number], f"the exception for {number} is not needed; accepted: none")
            for number in unused
        ]
    return [(text.count("\n", 0, position) + 1, why) for position, why in sorted(findings)]


def _known(tables: str) -> set[Number]:
    """Return the numbers of tables, with and without standard errors, and the complements of
    percentages to 100."""
    known = set()
    for number, _ in _numbers(tables):
        known |= {number, number._replace(error=""), Number(number.error, "", number.unit)}
        if number.unit == "%" and number.value.isdecimal():
            known.add(Number(str(100 - int(number.value)), "", "%"))
    return known


def _numbers(text: str) -> Iterator[tuple[Number, int]]:
    """Yield the numbers of a text with their positions, last first."""
    unit, start = "", len(text)
    for match in reversed(list(_NUMBER.finditer(text))):
        value, before, error, after = match.groups(default="")
        if before or after or not _SAME_UNIT.fullmatch(text[match.end() : start]):
            unit = before or after
        start = match.start()
        yield Number(value, error, unit), start


def _blank(match: re.Match[str]) -> str:
    """Replace a match by spaces; lines keep their numbers."""
    return re.sub(r"[^\n]", " ", match[0])
