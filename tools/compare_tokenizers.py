"""Count the strings to which our tokenizer and CLIP's published one, which repairs text with ftfy, give different ids.

`python -m tools.compare_tokenizers [FILE ...]` reads files of strings, one a line, and makes up some that are hard to
repair. Ids spell out the words that they encode, so any list of merges shows the same differences. The published
tokenizer is rebuilt from ftfy, its pattern for words, and the library tokenizers. Needs requirements-dev.txt.
"""

import html
import random
from collections.abc import Iterable
from html.entities import html5
from pathlib import Path

import ftfy
import regex
from tokenizers.models import BPE

from clip_text import END, START, WORD_END, Tokenizer, byte_symbols
from support.errors import reading, run_command_line
from support.options import ArgumentParser, positive_int, seed

TINY_MERGES = Path(__file__).parents[1] / "models" / "tiny" / "merges.txt"
WORD = regex.compile(r"<\|(?:start|end)oftext\|>|'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
FRAGMENTS = """\
a Red circle it's 42 I'LL naïve café Ærø Straße ΣΊΣΥΦΟΣ İzmir Жёлтый 日本語 한국어 हिन्दी ไทย العربية
&amp; &lt; &gt; &quot; &#39; &nbsp; &rsquo; &hellip; &eacute; &EACUTE; &eACUTE; &SZLIG; &semi; &#x2019;
& &; &# &#; &#x; &amp &ampamp; &amp;amp; &amp;lt; &copy &notit; &#12a; &#xD83D; &#0; ＆ａｍｐ； #39; amp;
Ǆ ǅ ǆ Ǉ ǈ ǉ Ǌ ǋ ǌ Ǳ ǲ ǳ Ĳ ĳ ŉ ﬀ ﬁ ﬂ ﬃ ﬄ ﬅ ﬆ ﬓ ﷺ æ œ ſ
' '' " ʼ ‘ ’ ‚ ‛ “ ” „ ‟ ′ « » ` ´
< > <b> </b> <br/> ＜ &lt; <| |> <|startoftext|> <|endoftext|> <|ENDOFTEXT|> <|endoftext &lt;|endoftext|&gt;"""
KINDS = [line.split() for line in FRAGMENTS.splitlines()] + [
    [" ", "  ", "\t", "\xa0", "\u2003", "\u3000", "\u200b", "\u202f", "\u1680", "\u2060", "\xad", "<|endof text|>"],
    ["\n", "\r\n", "\r", "\x0c", "\x85", "\u2028", "\u2029"],
    ["\0", "\x07", "\x08", "\x0b", "\x1a", "\x1c", "\x1f", "\x7f", "\u206a", "\ufeff", "\ufff9", "\ufffc", "\ufffd"],
    ["\x1b[0m", "\x1b[1;31m", "\x1b[K", "\x1b[", "\x1b", "\x1b[?25l", "\x1b]0;title\x07", "\x1b[٣m", "0m"],
    ["\ud83d", "\ude00", "\ud83d\ude00", "\ude00\ud83d", "\udce9", "\udcff\udcfe"],
    ["😀", "👩\u200d🚀", "❤\ufe0f", "👍🏽", "🇫🇷", "1\ufe0f\u20e3", "🏴\U000e0067\U000e0062\U000e007f", "☃"],
    ["e\u0301", "\u0323\u0302", "\u3099", "\u1100\u1161", "\u212b", *map(chr, range(0x300, 0x370))],  # accents
    [*map(chr, range(0xFF01, 0xFFF0))],  # full and half width
    [*map(chr, range(0x80, 0x180))],  # C1 controls, accented letters, symbols: some pairs look mis-decoded
    [*map(chr, range(0x10000))],
]


def random_fragment(rng: random.Random) -> str:
    """A piece of a hard string: first its kind is drawn, then one of that kind."""
    name, number = rng.choice([*html5]), rng.randrange(0x300)  # of an html entity
    entities = [
        "&" + rng.choice([name, name.upper(), name.lower()]),
        f"&#{rng.choice(['', 'x', 'X'])}{number:{rng.choice('dxX')}}{rng.choice([';', ''])}",
    ]
    return rng.choice(rng.choice([*KINDS, entities]))


def published_ids(text: str, tokenizer: Tokenizer, bpe: BPE, **options: bool) -> list[int]:
    """What CLIP's published tokenizer makes of a text, with these `options` of ftfy."""
    text = html.unescape(html.unescape(ftfy.fix_text(text, **options)))
    ids = []
    for word in WORD.findall(regex.sub(r"\s+", " ", text.strip()).strip().lower()):
        symbols = "".join(byte_symbols()[byte] for byte in word.encode())
        ids += [tokenizer.ids[word]] if word in (START, END) else [token.id for token in bpe.tokenize(symbols)]
    return ids


def compare(name: str, strings: Iterable[str], tokenizer: Tokenizer, bpe: BPE, show: int) -> None:
    """Print how many of the strings differ, and `show` of those that differ for more than mis-decoded text."""
    distinct, misdecoded, other = set(strings), 0, []
    for text in sorted(distinct):
        ids = tokenizer.encode(text)
        if ids != published_ids(text, tokenizer, bpe):
            if ids == published_ids(text, tokenizer, bpe, fix_encoding=False):
                misdecoded += 1
            else:
                other.append(text)
    print(f"{name}: of {len(distinct)} strings, {misdecoded} differ by ftfy's repair of mis-decoded text", end=", ")
    print(f"{len(other)} otherwise", *map(ascii, other[:show]), sep="\n  ")


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.compare_tokenizers", description="Our ids beside the published ones.")
    parser.add_argument("file", nargs="*", type=Path, help="files of strings, one a line")
    parser.add_argument("--hard", type=positive_int, default=24_000, help="strings to make up (default: 24000)")
    parser.add_argument("--merges", type=Path, default=TINY_MERGES, help="merges.txt, or CLIP's published list as .gz")
    parser.add_argument("--show", type=positive_int, default=10, help="differences to print (default: 10)")
    parser.add_argument("--seed", type=seed, default=0)
    args = parser.parse_args()
    with reading(args.merges, "list of merges", "choose other --merges"):
        tokenizer = Tokenizer.from_merges(args.merges)
    bpe = BPE(vocab=tokenizer.ids, merges=list(tokenizer.ranks), end_of_word_suffix=WORD_END)
    for path in args.file:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
        compare(path.name, lines, tokenizer, bpe, args.show)
    rng = random.Random(args.seed)
    hard = ["".join(random_fragment(rng) for _ in range(rng.randint(2, 8))) for _ in range(args.hard)]
    compare("made up", hard, tokenizer, bpe, args.show)


if __name__ == "__main__":
    run_command_line(main)
