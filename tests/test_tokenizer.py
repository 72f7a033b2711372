"""Repairs, ids back to text, and what of a prompt does not fit. test_golden.py checks ids against the released ones."""

from pathlib import Path

import pytest

from clip_text import MAX_LENGTH, Tokenizer
from support.text import repair

LIMIT = MAX_LENGTH - 2  # tokens of a prompt between start and end


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_merges(Path(__file__).parents[1] / "models" / "tiny" / "merges.txt")


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("light blue triangle on dark slate gray background", "light blue triangle on dark slate gray background"),
        ("  A Red\tCircle\n", "a red circle"),
        ("It’s 42 &amp;amp; more", "it 's 4 2 & more"),
        ("cafe\u0301, naïve", "café , naïve"),
        ("日本語 🎨🖌", "日本語 🎨🖌"),
        ("", ""),
    ],
)
def test_decode_inverts_encode(tokenizer, text, normalised):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == normalised
    assert tokenizer.encode(normalised) == ids


def test_decode_takes_what_the_tokenizer_gives(tokenizer):
    row = tokenizer(["a red circle"])[0]
    assert tokenizer.decode(row[:5]) == "<|startoftext|>a red circle <|endoftext|>"
    with pytest.raises(IndexError):
        tokenizer.decode([len(tokenizer.ids)])


def test_cut(tokenizer):
    assert len(tokenizer.encode("circle")) == 1
    assert tokenizer.cut("") == tokenizer.cut("circle " * LIMIT) == ""
    assert tokenizer.cut("circle " * LIMIT + "Red, blue") == "red , blue"


def test_cut_inside_one_long_word(tokenizer):
    word = "x" * (LIMIT + 25)
    assert len(tokenizer.encode(word)) == len(word)  # no merge joins them
    assert tokenizer.cut(word) == "x" * 25


def test_cut_inside_a_character(tokenizer):
    """20 times four bytes: 75 tokens hold 18 whole characters and three bytes of the next, so one byte is left over."""
    assert len(tokenizer.encode("🎨" * 20)) == 80
    assert tokenizer.cut("🎨" * 20) == "\ufffd🎨"


@pytest.mark.parametrize("text", ["green square " * 50, "x" * 200, "ü" * 100, "日本語" * 40])
def test_nothing_is_lost(tokenizer, text):
    """The tokens kept and the tokens cut make the whole prompt."""
    kept, ids = tokenizer([text])[0, 1 : LIMIT + 1].tolist(), tokenizer.encode(text)
    assert kept == ids[:LIMIT]
    assert tokenizer.cut(text) == tokenizer.decode(ids[LIMIT:])
    assert tokenizer.decode(kept + ids[LIMIT:]) == text.strip()


@pytest.mark.parametrize(
    ("text", "repaired"),
    [
        ("plain text, naïve 日本語 &c.", "plain text, naïve 日本語 &c."),
        # surrogates: bytes of a command line that are no UTF-8, and halves of a character from JSON
        ("caf\udce9 \ud83d", "caf\ufffd \ufffd"),
        ("\ud83d\ude00 \ude00\ud83d\ud83d\ude00", "\U0001f600 \ufffd\ufffd\U0001f600"),
        ("\ud83d\0\ude00", "\ufffd\ufffd"),  # no pair: control characters go after surrogates
        # terminal escapes and control characters
        ("\x1b[1;31mred\x1b[0m \x1b[Kblue \x1b[?25l", "red blue [?25l"),
        ("\x1b[\x1b[0m0m", "[0m"),
        ("\ufeffa \ufeffred\0 \x7fcircle\x0b!\x1f\u206a\ufffc", "a red circle!"),
        ("tab\tand\x0cfeed\u200bstay", "tab\tand\x0cfeed\u200bstay"),
        ("\x80 5\x85 \x93quoted\x94 \x81", '\u20ac 5\u2026 "quoted" \x81'),
        # ligatures, digraphs, quotes, widths, accents
        ("ǄǅǆǇǈǉǊǋǌǱǲǳ Ĳĳ ŉ", "DŽDždžLJLjljNJNjnjDZDzdz IJij 'n"),
        ("ﬀ ﬁ ﬂ ﬃ ﬄ ﬅ ﬆ æ ﬓ", "ff fi fl ffi ffl ſt st æ ﬓ"),
        ("ʼ‘’‚‛ “”„‟ ′«»", "''''' \"\"\"\" ′«»"),
        ("Ｒｅｄ！ ｶﾞｰﾃﾞﾝ ￦ ﾡ ￣", "Red! ガーデン ₩ \u1100  \u0304"),
        ("cafe\u0301 \u212b \u1112\u1161\u11ab", "café Å 한"),
        # html entities, whole and broken
        ("&lt;b&gt; &eacute;&hearts; &#39;&#x2019; &#128;", "<b> é♥ '' €"),
        ("&amp;amp;eacute; ＆ｌｔ；", "é <"),
        ("&EACUTE; &SZLIG; &FRAC12; &HEARTS; &eACUTE; &LTRI; &GT;", "É SS ½ ♥ &eACUTE; &LTRI; >"),
        ("&eacute &amp &ampamp; &notit; &nosuch; &CounterClockwiseContourIntegral;",) * 2,
        ("&#; &#x; &#12a; &#59; &semi; &#0; &#xd83d; &#1;", "&#; &#x; &#12a; &#59; ; \ufffd \ufffd "),
        # from the first line with a "<" on, entities stay
        ("1 < 2 &eacute; &amp;amp; ‘&rsquo;", "1 < 2 &eacute; &amp;amp; '&rsquo;"),
        ("&eacute;\n&lt;&eacute;\n<br>&eacute;\n&eacute;", "é\n<é\n<br>&eacute;\n&eacute;"),
    ],
)
def test_repairs_are_those_of_ftfy(text, repaired):
    """The expected strings are what ftfy 6.3.1 gave."""
    assert repair(text) == repaired


def test_mis_decoded_text_stays():
    """Here ftfy would restore "café, déjà vu"."""
    assert repair("cafÃ©, dÃ©jÃ\xa0 vu") == "cafÃ©, dÃ©jÃ\xa0 vu"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("caf\udce9 \ud83d\ude00", "caf � 😀"),
        ("a\x1b[31m red\r\n\u3000circle\u2028", "a red circle"),
        ("&amp;rsquo;s &lt &notit;", "'s < ¬ it ;"),
        ("<b>&rsquo;s &amp;lt;", "< b >’ s <"),  # the quote stays curly: its entity comes after the repairs
    ],
)
def test_html_after_the_repairs(tokenizer, text, words):
    """CLIP's tokenizer unescapes html twice more, after ftfy; then all white space is alike."""
    assert tokenizer.decode(tokenizer.encode(text)) == words
