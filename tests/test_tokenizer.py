"""Words, ids back to text, and what of a prompt does not fit. test_golden.py checks ids against the released ones."""

import pytest

from clip_text import MAX_LENGTH, Tokenizer
from stable_diffusion import TINY_FILE

LIMIT = MAX_LENGTH - 2  # tokens of a prompt between start and end
WORDS = {
    "light blue triangle on dark slate gray background": "light blue triangle on dark slate gray background",
    "  A Red\tCircle\n": "a red circle",
    "": "",
    # ftfy's repairs: surrogates of a command line, mis-decoded text, escapes, widths, ligatures, quotes, entities
    "caf\udce9 \ud83d\ude00 cafÃ©, dÃ©jÃ\xa0 vu": "caf � 😀 café , déjà vu",
    "a\x1b[31m red\r\n\u3000circle\u2028": "a red circle",
    "Ｒｅｄ ｶﾞｰﾃﾞﾝ ﬁ ‘quoted’ &EACUTE; cafe\u0301": "red ガーデン fi ' quoted ' é café",
    # CLIP's tokenizer unescapes html twice more
    "&amp;rsquo;s &lt &notit; &amp;amp;": "'s < ¬ it ; &",
    "<b>&rsquo;s &amp;lt;": "< b >’ s <",  # the quote stays curly: its entity comes after the repairs
    # words: contractions, single digits, letters of any script, special tokens; one mark is lost, as in CLIP
    "It’s I'LL 42 naïve日本 ½x²!!": "it 's i 'll 4 2 naïve日本 ½ x ² !!",
    "<|ENDOFTEXT|>a\u0345b a\u0301b": "<|endoftext|>a b áb",
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_merges(TINY_FILE.parent / "merges.txt")


@pytest.mark.parametrize("text", WORDS)
def test_text_is_treated_as_in_clip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == WORDS[text]


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
    ids = tokenizer.encode(text)
    assert (len(ids), tokenizer.cut(text)) == (tokens, rest)
    assert tokenizer([text])[0, 1 : LIMIT + 1].tolist() == ids[:LIMIT]
