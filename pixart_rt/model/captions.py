"""Caption cleaning by DeepFloyd-IF's rules, as for the captions of the published checkpoints.

The rules are those of diffusers' `PixArtAlphaPipeline._clean_caption`, in its order and with its
results to the letter (tests compare the two). Five of its patterns take quadratic time, minutes for
a long row of full stops; here every pattern is linear. HTML's parser and ftfy, which the rules
call, are not: text is cut after MAX_CHARACTERS, and after MAX_MARKUP where it may be HTML. Plain
prompts need neither library, so they are imported when a text does.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from html import unescape
from string import ascii_letters, digits
from urllib.parse import unquote_plus

MAX_CHARACTERS = 100_000  # the models read 120 or 300 tokens of what is left
MAX_MARKUP = 4_000  # characters with HTML in them: 0.1 s at worst, an unclosed tag in every word
MAX_ENTITIES = 50  # ftfy begins again for each of nested ones: ＆amp;amp;amp;

_PERSON = re.compile("<person>")
_HOST = ascii_letters + digits + ".-"
_WORD = re.compile(r"[a-zA-Z0-9.\-]+")  # of these characters
_BOUNDARY = re.compile(r"\b[a-zA-Z0-9.\-]")
_DOMAIN = re.compile(r"\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)")
_SCHEMES = (
    re.compile(r"\bhttps?:(?:/{1,3}|[a-zA-Z0-9%])"),
    re.compile(r"\bwww:(?:/{1,3}|[a-zA-Z0-9%])"),
)
_DECIMAL_REFERENCE = re.compile(r"&#[0-9]{4000,}")  # beyond it Python refuses to read the number

_Rule = tuple["re.Pattern[str]", str]


def _rules(*rules: tuple[str, str]) -> tuple[_Rule, ...]:
    return tuple((re.compile(pattern), to) for pattern, to in rules)


_BEFORE_REPAIR = _rules(
    (r"@[\w\d]+\b", ""),  # @nickname
    (r"[\u31c0-\u31ef]+", ""),  # CJK strokes
    (r"[\u31f0-\u31ff]+", ""),  # Katakana phonetic extensions
    (r"[\u3200-\u32ff]+", ""),  # enclosed CJK letters and months
    (r"[\u3300-\u33ff]+", ""),  # CJK compatibility
    (r"[\u3400-\u4dbf]+", ""),  # CJK unified ideographs, extension A
    (r"[\u4dc0-\u4dff]+", ""),  # Yijing hexagrams
    (r"[\u4e00-\u9fff]+", ""),  # CJK unified ideographs
    (
        r"[\u002D\u058A\u05BE\u1400\u1806\u2010-\u2015\u2E17\u2E1A\u2E3A\u2E3B\u2E40\u301C\u3030"
        r"\u30A0\uFE31\uFE32\uFE58\uFE63\uFF0D]+",
        "-",
    ),  # dashes of all kinds
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # article numbers
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    # File names. Only from the start of a word: what fails there fails from its later letters too.
    (r"(?<!\S)\S+\.(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)", ""),
    (r"[\"\']{2,}", '"'),
    (r"[\.]{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~\)\(\]\[\}\{\|\\/\*]{1,}", " "),
    (r"(?<!\s)\s++\.\s+", " "),  # a full stop alone; from the first space of a row only
)
_DASH = re.compile(r"[-_]")
_AFTER_REPAIR = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (r"\b(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+(?:\.\d*)?[xх×]\d+(?:\.\d*)?\b", ""),  # 1024x768; the second x is Cyrillic
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"\']([\w\W]+)[\"\']$", r"\1"),
    (r"^[\'\_,\-\:;]", ""),
    (r"[\'\_,\-\:\-\+]$", ""),
    (r"^\.\S+$", ""),
)


def clean_caption(text: str) -> str:
    """A caption as the training data had it: cleaned twice, lower case, stripped."""
    text = text[:MAX_CHARACTERS]
    return _clean_once(_clean_once(text))


def without_lone_surrogates(text: str) -> str:
    """The text with U+FFFD for halves of UTF-16 pairs, which JSON can hold and UTF-8 cannot.

    Captions that were cut after a number of characters end in half an emoji.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _clean_once(text: str) -> str:
    text = unquote_plus(text).strip().lower()
    text = _PERSON.sub("person", text)
    for scheme in _SCHEMES:
        text = _without_urls(text, scheme)
    text = _without_markup(text)
    for pattern, to in _BEFORE_REPAIR:
        text = pattern.sub(to, text)
    if len(_DASH.findall(text)) > 3:  # this-is-my-cute-cat
        text = _DASH.sub(" ", text)
    text = _repaired(text)
    for pattern, to in _AFTER_REPAIR:
        text = pattern.sub(to, text)
    return text.strip()


def _without_urls(text: str, scheme: re.Pattern[str]) -> str:
    r"""The text without what one pattern of diffusers matches, in linear time:

        \b((?:scheme|[a-zA-Z0-9.\-]+[.](?:com|co|…)[\w/-]*\b\/?(?!@)))

    Its second half runs from the first boundary in a word to the word's last domain. Where it fails
    there, it fails at every later boundary of the word too.
    """
    ends = {domain.start(): domain.end() for domain in _DOMAIN.finditer(text)}
    if not ends:
        return scheme.sub("", text)
    kept: list[str] = []
    position = 0

    def cut(start: int, end: int) -> None:
        nonlocal position
        kept.append(text[position:start])
        position = end

    url = scheme.search(text)
    for begin, dot in _hosts(text, list(ends)):
        while True:
            if url is not None and url.start() < position:
                url = scheme.search(text, position)
            boundary = _BOUNDARY.search(text, max(position, begin), dot)
            if boundary is None:
                break
            if url is None or url.start() > boundary.start():
                cut(boundary.start(), ends[dot])
                break
            cut(*url.span())
    return "".join([*kept, scheme.sub("", text[position:])])


def _hosts(text: str, dots: list[int]) -> Iterator[tuple[int, int]]:
    """The start of every word that has one of these dots, and its last one."""
    start = end = 0
    for dot, following in zip(dots, [*dots[1:], len(text)], strict=True):
        if dot >= end:
            start = end + len(text[end:dot].rstrip(_HOST))
            word = _WORD.match(text, dot)
            assert word is not None
            end = word.end()
        if following >= end:
            yield start, dot


def _without_markup(text: str) -> str:
    """The text of HTML, without its tags and with its entities as characters."""
    if "<" not in text and "&" not in text:
        return text
    from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning  # a tenth of a second to import

    text = _DECIMAL_REFERENCE.sub("&#99999999", text[:MAX_MARKUP])
    with warnings.catch_warnings():  # of text that looks like a file name: it is a caption
        warnings.filterwarnings("ignore", category=MarkupResemblesLocatorWarning)
        return BeautifulSoup(text, features="html.parser").text


def _repaired(text: str) -> str:
    """The text without mojibake, halves of characters, control characters and entities."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return text  # as ftfy leaves it
    import ftfy

    if text.count(";") > MAX_ENTITIES:
        text = text[:MAX_MARKUP]
    try:
        text = ftfy.fix_text(text)
    except UnicodeEncodeError:  # half an emoji beside mojibake, which ftfy repairs first
        text = ftfy.fix_text(ftfy.fixes.fix_surrogates(text))
    return unescape(unescape(_DECIMAL_REFERENCE.sub("&#99999999", text)))
