"""Repairs of a prompt before it is tokenized: what the library ftfy does in CLIP's published tokenizer.

Tables and order are those of `fix_text` in ftfy 6.3.1 with its defaults. Left out is the repair of mis-decoded text
("cafÃ©" for "café"): it guesses, by rules that fill a library of their own. Line breaks and the ideographic space stay
as they are, because the tokenizer treats all white space alike.
"""

import html
import re
import unicodedata
from html.entities import html5

REPLACED = str.maketrans(
    {
        **{c: unicodedata.normalize("NFKC", c) for c in "ĲĳŉǄǅǆǇǈǉǊǋǌǱǲǳﬀﬁﬂﬃﬄﬆ"},  # ligatures and digraphs
        "ﬅ": "ſt",  # NFKC goes on to "st"
        **{c: unicodedata.normalize("NFKC", c) for c in map(chr, range(0xFF01, 0xFFF0))},  # full and half width
        **{c: html.unescape(f"&#{ord(c)};") for c in map(chr, range(0x80, 0xA0))},  # C1 controls, as Windows-1252
        **dict.fromkeys("ʼ‘’‚‛", "'"),
        **dict.fromkeys("“”„‟", '"'),
    }
)
REMOVED = re.compile(
    r"\x1b\[[\d;]*[A-Za-z]"  # terminal escapes
    r"|[\0-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]"  # control characters, byte order marks
)
ENTITY = re.compile("&#?[0-9A-Za-z]{1,24};")


def unescape(match: re.Match) -> str:
    """What an html entity stands for, with its name in capitals (&EACUTE;) too; anything else stays as it is."""
    entity, name = match[0], match[0][1:]
    text = html.unescape(entity)
    if name in html5 or (name[0] == "#" and ";" not in text):  # with a ";" in it, only a part was read as a number
        return text
    if name.isupper() and text == entity:
        return html5.get(name.lower(), entity).upper()
    return entity


def repair_line(line: str, entities: bool) -> str:
    """Repair one line, again and again until nothing changes; html entities only if `entities`."""
    before = None
    while line != before:
        before = line
        if entities:
            line = ENTITY.sub(unescape, line)
        line = line.translate(REPLACED)
        line = line.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # joins pairs, a lone one is U+FFFD
        line = unicodedata.normalize("NFC", REMOVED.sub("", line))
    return line


def repair(text: str) -> str:
    """Replace curly quotes, ligatures, odd widths, entities and surrogates; compose accents; remove control characters.

    A "<" suggests that the text is html: from the first line with one, entities stay as they are.
    """
    lines, entities = [], True
    for line in text.split("\n"):
        entities = entities and "<" not in line
        lines.append(repair_line(line, entities))
    return "\n".join(lines)
