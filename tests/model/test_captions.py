"""Caption cleaning: to the letter as diffusers does it, and in linear time."""

from __future__ import annotations

import random
import time

import pytest

from pixart_rt.model.captions import MAX_CHARACTERS, clean_caption

CAPTIONS = [
    "A <b>Red</b> Circle above a blue square",
    "see http://example.com/a.png for 1024x768, café & crème #42 @someone",
    "  «quoted» — “text”, 10.5×3 IMG_1234.jpg  ",
    "",
    "a.com/https:https://b.org@ www:x a.net@ .ru é.com _a.gov/x-/@ https:a.com",
    "--.co a.com.b.ru@.it-/ x-y.edu?q=1 www:www:a",
    "1.x2 1.5x2.5_ 1x22.33_ j2d1a2a_ a1b22222_ 12.5х3",
    "x . . y .  z a .b . x.png.y a.jpg.pdf .png x.apk",
    "Ã©t&#233;; ï¼†amp;amp; &lt;b&gt; &amp;lt; &quot;x&quot; &#1; &#x41;",
    "“＆amp;amp;lt;” Ｗｉｄｅ ﬁ … \x1b[31mred\x1b[0m \u2028 \x85",
    "free shipping download free click on it page 12 png images worldwide  free  shipping",
    "<person> sits, 1:23 \n",
    "this-is-my_cute-cat #1234 #12345 1234567 jc6640 6640vc231 192.168.0.1",
    "%3Cb%3Ex%3C/b%3E+and%20more%",
]

# Every character that a rule names, and the beginnings of what rules match.
PIECES = [
    "a", "b1", "1", "12", "123456", "é", "_", "-", ".", "..", ":", "/", "//", "@", "#", "&",
    "&amp;", "&quot;", "&#65;", "&lt;", "<b>", "</b>", "<", "<!--", "-->", " ", "  ", "\n", "\t",
    "\\n", "%20", "+", "https:", "http://", "www:", "www://", "https:h", ".com", ".co", "com",
    "a.com", ".net/", ".ru-", ".png", "x.jpg", ".gov@", "x", "×", "х", "1.5", "10x20", "free",
    "shipping", "download", "worldwide", "page 12", "click for", "click on", " image", "images",
    "红", "㐀", "´", "“", "”", "'", '"', "’", "Ａ", "＆", "ﬁ", "Ã©", "â€™", "😀", "\x00",
    "\x1b[31m", "\xa0", "\u2028", "<person>", "j2d1a2", "(", ")", "[", "*", "|", "!", "?", ",", ";",
    "1:23 ", "É", "İ", "ß", "K", "٣", "１", "Å", "\x85", "\r\n", "png", "_x",
]  # fmt: skip
RANGES = ((32, 127), (0xA0, 0x250), (0x2000, 0x2100), (0x20, 0xD800))


def cleaned_by_diffusers(caption: str) -> str:
    from diffusers import PixArtAlphaPipeline

    pipeline = object.__new__(PixArtAlphaPipeline)
    return PixArtAlphaPipeline._text_preprocessing(pipeline, caption, clean_caption=True)[0]


@pytest.mark.parametrize("caption", CAPTIONS)
def test_captions_are_cleaned_as_diffusers_does(caption: str) -> None:
    assert clean_caption(caption) == cleaned_by_diffusers(caption)


@pytest.mark.filterwarnings("ignore::bs4.MarkupResemblesLocatorWarning")  # diffusers'
@pytest.mark.parametrize("seed", range(2))
def test_random_captions_are_cleaned_as_diffusers_does(seed: int) -> None:
    generator = random.Random(seed)
    for _ in range(500):
        length = generator.choice([1, 3, 6, 12, 30])
        if generator.random() < 0.2:
            caption = "".join(chr(generator.randrange(*generator.choice(RANGES)))
                              for _ in range(length))  # fmt: skip
        else:
            caption = "".join(generator.choice(PIECES) for _ in range(length))
        assert clean_caption(caption) == cleaned_by_diffusers(caption), repr(caption)


def test_half_an_emoji_is_cleaned() -> None:
    """Where diffusers' rules stop with a UnicodeEncodeError: mojibake next to a lone surrogate."""
    assert clean_caption("a red circle \ud83d") == "a red circle �"
    assert clean_caption("Ã© \ud83d").encode()


@pytest.mark.parametrize("prefix", ["&", "＆", "&amp;"])
def test_an_endless_character_reference_is_cleaned(prefix: str) -> None:
    """Python refuses to read integers of more than 4300 digits."""
    assert len(clean_caption(f"a {prefix}#{'1' * 5000}; b")) < 5010


UNITS = [
    "a.", ".", " ", " .", "ten words ", "a.com", "a.com ", "a.com@", ".com-@", "https:", "<b>", "<",
    "<!--", "<![CDATA[", "<?", "<a b='", "<a ", "&amp;", "amp;", "&#", "1", "a1", "1x", "1.", "x.",
    "free ", "worldwide  ", "page  1", "'", "-", "Ã©", "â€™ ", "\ud83d", "\x1b[", "\n", "\u0301",
    "＆amp;", "＆#38;", "a1b1",
]  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
def test_a_hundred_kilobytes_take_no_minutes(unit: str) -> None:
    """Rules in quadratic time take minutes for most of these; 0.1 to 0.2 s is usual for one."""
    text = unit * (MAX_CHARACTERS // len(unit)) + "_"
    start = time.process_time()
    clean_caption(text)
    assert time.process_time() - start < 5
