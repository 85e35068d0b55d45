"""Cleaning of prompts that were written for other tools: control characters, options of A1111 and Midjourney."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

# joiners of emoji and of Persian and Indic scripts: invisible, but part of the text
KEPT_FORMATS = "\u200c\u200d"
NUMBER = r"[-+]?\d*\.?\d+"
ADDRESS = re.compile(r"<?https?://[^\s>]+>?\s*")
NETWORK = re.compile(r"<(lora|lyco|hypernet):([^<>:]+)[^<>]*>", re.IGNORECASE)
# what A1111 writes below a prompt: the negative prompt and the settings
SETTINGS = re.compile(r"(?:\bNegative prompt:|\bSteps: \d+, ).*", re.DOTALL)
WEIGHT = re.compile(rf"(?<!\\)\(([^()\\]*(?:\\.[^()\\]*)*)(?<!\d):\s*{NUMBER}\s*\)")
DOUBLE = re.compile(r"(?<!\\)\(\(([^()]*)\)\)|(?<!\\)\[\[([^\[\]]*)\]\]")
PART_WEIGHT = re.compile(rf"::\s*(?:{NUMBER})?(?=\s|$)")
# a dash of each kind: phones write an em dash for two hyphens
OPTION = re.compile(r"(?:^|(?<=\s))(?:--|[\u2013\u2014])([a-z]+)\b", re.IGNORECASE)
SHORT_OPTION = re.compile(r"(?:^|(?<=\s))-([a-z]) (\d+)(?=\s|$)", re.IGNORECASE)
VALUE = re.compile(
    rf"[\s=]+(?:https?://\S+|{NUMBER}(?:[:x]{NUMBER})?|raw|random|[a-z0-9]{{0,40}}\d[a-z0-9]{{0,40}})(?=\s|,|$)", re.I
)
WORDS_FOLLOW = {"no", "style", "quality", "q"}
UNPARSED = {
    "prompt editing [from:to:when]": re.compile(rf"\[[^\[\]]*:\s*{NUMBER}\s*\]"),
    "alternatives [a|b] or {a|b}": re.compile(r"\[[^\[\]]*\|[^\[\]]*\]|\{[^{}]*\|[^{}]*\}"),
    "wildcards __name__": re.compile(r"__[\w/-]+__"),
    "BREAK or AND": re.compile(r"\b(?:BREAK|AND)\b"),
}


@dataclass
class Cleaned:
    """A cleaned prompt and how often each thing was taken out of it, or seen in it and left.

    Attributes:
        text: without line breaks and repeated spaces; may be empty.
        removed: by name, such as `--ar`, `<lora:name>`, `(word:1.2)` or `U+0007`.
        left: by name; syntax of other tools that has no single plain text.
    """

    text: str
    removed: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)


def clean_prompt(text: str) -> Cleaned:
    """Return a prompt as a text encoder should read it.

    Words in a weight, `(word:1.2)`, `((word))` or `[[word]]`, stay; what addresses a program, such as `--ar 3:2` or
    `<lora:name:0.8>`, goes. Single brackets may be the writer's own and stay.
    """
    cleaned = Cleaned("")
    text = _without_controls(text, cleaned.removed)
    for pattern, name, kept in (
        (SETTINGS, "settings of A1111", lambda _: ""),
        (NETWORK, lambda found: f"<{found[1].lower()}:{found[2].strip()}>", lambda _: ""),
        (ADDRESS, "image addresses", lambda _: ""),
    ):
        text = _take_out(text, pattern, name, kept, cleaned.removed)
    text = _without_options(text, cleaned.removed)
    before = None
    while text != before:  # weights can be nested
        before = text
        text = _take_out(text, WEIGHT, "(word:1.2)", lambda found: found[1], cleaned.removed)
        text = _take_out(text, DOUBLE, "((word))", lambda found: found[1] or found[2] or "", cleaned.removed)
    text = _take_out(text, PART_WEIGHT, "part::2", lambda _: " ", cleaned.removed)
    for name, pattern in UNPARSED.items():
        if count := len(pattern.findall(text)):
            cleaned.left[name] += count
    text = re.sub(r"\\([()\[\]])", r"\1", text)
    text = re.sub(r"\s+([,.;])", r"\1", " ".join(text.split()))
    cleaned.text = re.sub(r"(?:,\s*){2,}", ", ", text).strip(" ,")
    return cleaned


def _without_controls(text: str, removed: Counter[str]) -> str:
    """Return the text without control characters; line breaks and tabs become spaces and are not counted."""

    def keep(character: str) -> str:
        category = unicodedata.category(character)
        if character.isspace():
            return " "
        if category in ("Cc", "Cs", "Co", "Cn") or (category == "Cf" and character not in KEPT_FORMATS):
            name = unicodedata.name(character, "")
            removed[f"U+{ord(character):04X}{' ' + name if name else ''}"] += 1
            return ""
        return character

    return text if text.isascii() and text.isprintable() else "".join(map(keep, unicodedata.normalize("NFC", text)))


def _take_out(
    text: str,
    pattern: re.Pattern[str],
    name: str | Callable[[re.Match[str]], str],
    kept: Callable[[re.Match[str]], str],
    removed: Counter[str],
) -> str:
    def replace(found: re.Match[str]) -> str:
        removed[name if isinstance(name, str) else name(found)] += 1
        return kept(found)

    return pattern.sub(replace, text)


def _without_options(text: str, removed: Counter[str]) -> str:
    """Return the text without options. `--no` takes all words up to the next option, others take one value."""
    parts, at = [], 0
    options = list(OPTION.finditer(text))
    for number, option in enumerate(options):
        name = option[1].lower()
        parts.append(text[at : option.start()])
        end = options[number + 1].start() if number + 1 < len(options) else len(text)
        value = VALUE.match(text, option.end(), end)
        if name in WORDS_FOLLOW and (name == "no" or not value):
            at = end if name == "no" else _after_word(text, option.end(), end)
        else:
            at = value.end() if value else option.end()
        removed[f"--{name}"] += 1
    text = "".join([*parts, text[at:]])
    return _take_out(text, SHORT_OPTION, lambda found: f"-{found[1]}", lambda _: "", removed)


def _after_word(text: str, start: int, end: int) -> int:
    found = re.compile(r"\s*\S+").match(text, start, end)
    return found.end() if found else end
