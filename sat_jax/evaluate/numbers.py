r"""Numbers in text: which ones are read, and which ones are refused.

An expression is a number with everything that belongs to it: sign, currency, unit, and further
numbers that an operator or a space joins to it. It has a value if it is one of

- a decimal number, which may begin with its point: 18, 18.50, .75, 2.5e-3;
- a number with thousands separators: 1,234,567.5; also with ' or a no-break space;
- a fraction, alone or after a whole number: 3/4, 2 1/2, ½, \frac{3}{4};

with an optional sign (+, -, or a Unicode minus) and an optional currency sign, in any order. Units
and percent signs are ignored: 50% and 50 km are 50.

Any other expression has no value, and no part of it is read: ranges (3-5, 3 to 5, between 3 and 5),
calculations (12 - 18, 5*3, 10^6, 2\sqrt{3}), times, dates and versions (12:30, 2024-05-01, 1.2.3),
ambiguous separators (3,4 or 1.234,5 or 1 234), digits in words and indices (CO2, COVID-19, x_1), a
sign with a space after it within a line (is - 5), and multiples (5k, 5 million, 2π).
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from unicodedata import normalize

_MINUS = "-−–﹣－"
_DASHES = f"{_MINUS}‐‑—"
_SIGN = f"[{_MINUS}+]"
_CURRENCY = r"(?:(?:US|[A-Z])?\\?\$+|[€£¥₹₩₽₺₪₫฿¢])"
_GAP = "[\u00a0\u2009\u202f]"  # no-break, thin and narrow no-break space
_VULGAR = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_MULTIPLE = (
    r"(?:(?:(?-i:[kKMB])|bn|mn|tn|(?:hundred|thousand|million|billion|trillion|dozen)s?|\\?pi|π)"
    r"(?![^\W\d_])|\\sqrt|√|[十百千万萬億亿兆])"
)

# A word ends at white space, brackets, relations and CJK punctuation. A colon and a no-break space
# between digits are in a word.
_WORD = re.compile(
    r"(?:[^\s:;=<>≤≥≈→⇒()\[\]{}|\"“”„«»，。：；（）、！？]"
    rf"|(?<=\d)(?::(?=\d)|{_GAP}(?=\d{{3}}(?!\d))))+"
)
_DIGIT = re.compile(r"\d")
_SIGNED_CURRENCY = re.compile(rf"{_SIGN}{_CURRENCY}|{_CURRENCY}{_SIGN}")
_ARITHMETIC = re.compile(r"[+*/×÷·^]|\*\*|\\times|\\cdot|\\div")
_DASH_OR_TO = re.compile(rf"[{_DASHES}x]|to", re.IGNORECASE)
# Two words that may be one number: 2 1/2 or 1 234.
_SPACED = re.compile(r"(?:.*\D)?\d{1,3} (?:\d+/\d+|\d{3}(?:\.\d+)?)\D*", re.DOTALL)
_IN_FORMULA = re.compile(r"(?:[\^_]|\\sqrt|\\[dt]?frac|√|\})\{\Z")
_MULTIPLIED = re.compile(rf"[ \t]+{_MULTIPLE}", re.IGNORECASE)
_NUMBER = re.compile(
    rf"[{_CJK}]*(?:(?P<sign>{_SIGN})?{_CURRENCY}?|{_CURRENCY}(?P<inner_sign>{_SIGN}))"
    r"(?P<value>(?:\d+ )?\d+/\d+"
    rf"|(?:[1-9]\d{{0,2}}(?P<mark>[,'’]|{_GAP})\d{{3}}(?:(?P=mark)\d{{3}})*|\d+)(?:\.\d+)?"
    rf"(?:e{_SIGN}?\d{{1,3}})?|\.\d+)"
    rf"(?!-?{_MULTIPLE})(?:\\?%|°|{_CURRENCY}|\\(?:text|mathrm|mbox))?"
    rf"(?![²³])(?:[^\W\d_]|[{_DASHES}/·'’²³.])*",
    re.IGNORECASE,
)
_MARKUP = "*_`'‘’#~"


def last_number(text: str) -> str | None:
    """Return the last number of a text in plain form: "-1234.50", "3/4" or "2 1/2".

    None if the text has no number, or if its last expression has no value.
    """
    text = _plain(text)
    expressions = list(_expressions(text))
    return _read(text, expressions[-1]) if expressions else None


def number_after(marker: str, text: str) -> str | None:
    """Return the number after the last `marker` that an expression follows, in plain form.

    None if there is no such marker, or if the expression has no value.
    """
    text = _plain(text)
    for expression in reversed(list(_expressions(text))):
        before = text[: expression[0].start()].rstrip()
        if before.endswith(marker) or expression[0][0].startswith(marker):
            return _read(text, expression)
    return None


def value_of(text: str) -> Fraction | None:
    """Return the value of a text that is one number and nothing else, or None."""
    text = _plain(text.strip())
    for expression in _expressions(text):
        if (expression[0].start(), expression[-1].end()) == (0, len(text)):
            number = _read(text, expression)
            return None if number is None else _value(number)
    return None


def _plain(text: str) -> str:
    """Return `text` with fractions as 3/4, and without LaTeX in numbers."""
    text = text.replace(r"\!", "").replace("{,}", ",").replace(r"\,", "\u2009")
    text = re.sub(r"\^\{?\\circ\}?", "°", text)
    text = re.sub(r"(\d?)\\[dt]?frac\{(\d+)\}\{(\d+)\}", _fraction, text)
    return re.sub(rf"(\d?)[ \t]?([{_VULGAR}])", _fraction, text)


def _fraction(match: re.Match[str]) -> str:
    """Return "3/4" for a fraction, or "2 3/4" after a digit."""
    integer, *parts = match.groups()
    fraction = normalize("NFKC", "/".join(parts)).replace("\u2044", "/")
    return f"{integer} {fraction}" if integer else fraction


def _expressions(text: str) -> Iterator[list[re.Match[str]]]:
    """Yield the words of each expression, in order. An operator is a word."""
    words: list[re.Match[str]] = []
    for word in _WORD.finditer(text):
        if words and _continues(text, words, word):
            words.append(word)
            continue
        yield from _complete(words)
        words = [word] if _begins(text, word) else []
    yield from _complete(words)


def _begins(text: str, word: re.Match[str]) -> bool:
    """Return whether `word` has a digit, or is a sign or operator that does not begin its line."""
    if _DIGIT.search(word[0]) or _SIGNED_CURRENCY.fullmatch(word[0]):
        return True
    line = text[text.rfind("\n", 0, word.start()) + 1 : word.start()]
    is_sign = word[0] in _MINUS or _ARITHMETIC.fullmatch(word[0])
    return bool(line.strip() and is_sign)


def _continues(text: str, words: list[re.Match[str]], word: re.Match[str]) -> bool:
    """Return whether `word` is an operator after `words`, or a number that is joined to them."""
    last = words[-1]
    if text[last.end() : word.start()].strip(" \t") or last.end() == word.start():
        return False
    if word[0] == "and":
        return text[: words[0].start()].rstrip().lower().endswith("between")
    if not _DIGIT.search(word[0]):
        return bool(_ARITHMETIC.fullmatch(word[0]) or _DASH_OR_TO.fullmatch(word[0]))
    return not _DIGIT.search(last[0]) or bool(_SPACED.fullmatch(f"{last[0]} {word[0]}"))


def _complete(words: list[re.Match[str]]) -> list[list[re.Match[str]]]:
    """Return the expression of `words`, if they have a number, without dashes at its end."""
    numbers = [index for index, word in enumerate(words) if _DIGIT.search(word[0])]
    if not numbers:
        return []
    after = words[numbers[-1] + 1 :]
    keep = any(_ARITHMETIC.fullmatch(word[0]) for word in after)
    return [words if keep else words[: numbers[-1] + 1]]


def _read(text: str, expression: list[re.Match[str]]) -> str | None:
    """Return the number of an expression in plain form, or None if it has no value."""
    if _IN_FORMULA.search(text[: expression[0].start()]):
        return None
    if _MULTIPLIED.match(text, expression[-1].end()):
        return None
    joined = " ".join(word[0] for word in expression)
    match = _NUMBER.fullmatch(joined.lstrip(_MARKUP).rstrip(_MARKUP + ".,!?…\\"))
    if match is None:
        return None
    number = match["value"].replace(match["mark"], "") if match["mark"] else match["value"]
    for minus in _MINUS:
        number = number.replace(minus, "-")  # of an exponent
    sign = "-" if (match["sign"] or match["inner_sign"] or "+") in _MINUS else ""
    return None if _value(number) is None else sign + number


def _value(number: str) -> Fraction | None:
    """Return the value of a number in plain form; None for n/0 and for thousands of digits."""
    try:
        value = sum(map(Fraction, number.lstrip("-").split(" ")), Fraction(0))
    except (ValueError, ZeroDivisionError):
        return None
    return -value if number.startswith("-") else value
