"""Words, ids back to text, and what of a prompt does not fit. test_golden.py checks ids against the released ones."""

from pathlib import Path

import pytest

from clip_text import MAX_LENGTH, Tokenizer

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


@pytest.mark.parametrize(
    ("text", "tokens", "rest"),
    [
        ("circle " * LIMIT, LIMIT, ""),
        ("circle " * LIMIT + "Red, blue", LIMIT + 3, "red , blue"),
        ("x" * (LIMIT + 25), LIMIT + 25, "x" * 25),  # one long word, in which no merge joins any
        ("🎨" * 20, 80, "\ufffd🎨"),  # 75 tokens hold 18 characters of four bytes and three bytes of the next
    ],
)
def test_cut(tokenizer, text, tokens, rest):
    assert len(tokenizer.encode(text)) == tokens
    assert tokenizer.cut(text) == rest


@pytest.mark.parametrize("text", ["green square " * 50, "x" * 200, "ü" * 100, "日本語" * 40])
def test_nothing_is_lost(tokenizer, text):
    """The tokens kept and the tokens cut make the whole prompt."""
    kept, ids = tokenizer([text])[0, 1 : LIMIT + 1].tolist(), tokenizer.encode(text)
    assert kept == ids[:LIMIT]
    assert tokenizer.cut(text) == tokenizer.decode(ids[LIMIT:])
    assert tokenizer.decode(kept + ids[LIMIT:]) == text.strip()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # ftfy's repairs: surrogates of a command line, mis-decoded text, escapes, widths, ligatures, quotes, entities
        ("caf\udce9 \ud83d\ude00 cafÃ©, dÃ©jÃ\xa0 vu", "caf � 😀 café , déjà vu"),
        ("a\x1b[31m red\r\n\u3000circle\u2028", "a red circle"),
        ("Ｒｅｄ ｶﾞｰﾃﾞﾝ ﬁ ‘quoted’ &EACUTE;", "red ガーデン fi ' quoted ' é"),
        # CLIP's tokenizer unescapes html twice more
        ("&amp;rsquo;s &lt &notit;", "'s < ¬ it ;"),
        ("<b>&rsquo;s &amp;lt;", "< b >’ s <"),  # the quote stays curly: its entity comes after the repairs
        # words: contractions, single digits, letters of any script, special tokens; one mark is lost, as in CLIP
        ("It’s I'LL 42 naïve日本 ½x²!!", "it 's i 'll 4 2 naïve日本 ½ x ² !!"),
        ("<|ENDOFTEXT|>a\u0345b a\u0301b", "<|endoftext|>a b áb"),
    ],
)
def test_text_is_treated_as_in_clip(tokenizer, text, words):
    assert tokenizer.decode(tokenizer.encode(text)) == words
