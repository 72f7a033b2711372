"""CLIP's text side: the byte-level BPE tokenizer, and the text transformer whose output is the UNet's context."""

import gzip
import html
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import regex
import torch
from torch import Tensor, nn

from unet import Attention

MAX_LENGTH = 77  # token ids per prompt, start and end included
NUM_MERGES = 48_894  # the published list is longer, but CLIP's vocabulary ends here
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
# What BPE works on, as published: special tokens, contractions, letters, single digits, the rest without white space.
WORD = regex.compile(r"<\|(?:start|end)oftext\|>|'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


@cache
def byte_symbols() -> dict[int, str]:
    """A printable character for each of the 256 bytes: its own if it has one, else one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    codes = zip(printable + others, [*printable, *range(256, 256 + len(others))])
    return {byte: chr(code) for byte, code in codes}  # in the order of CLIP's vocabulary


def join_pair(parts: list[str], pair: tuple[str, str]) -> None:
    """Join two neighbours, in place, wherever they are this pair."""
    i = 0
    while i < len(parts) - 1:
        if (parts[i], parts[i + 1]) == pair:
            parts[i : i + 2] = ["".join(pair)]
        i += 1


class Tokenizer:
    """Text to CLIP's token ids and back, by byte-level byte-pair encoding."""

    def __init__(self, merges: list[tuple[str, str]]):
        symbols = list(byte_symbols().values())
        self.tokens = symbols + [s + WORD_END for s in symbols] + ["".join(pair) for pair in merges] + [START, END]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.start, self.end = self.ids[START], self.ids[END]
        self.cache = {START: [self.start], END: [self.end]}

    @classmethod
    def from_merges(cls, path: str | Path) -> "Tokenizer":
        """Read a merges.txt (a "#version" line, then one pair per line), or CLIP's published list as .gz."""
        opener = gzip.open if Path(path).suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1 : NUM_MERGES + 1]
        merges = [tuple(line.split()) for line in lines if line]
        if odd := [" ".join(pair)[:60] for pair in merges if len(pair) != 2]:
            raise ValueError(f"expected two symbols in a line, found {odd[0]!r}")
        return cls(merges)

    def merge(self, word: str) -> list[int]:
        """One word to ids: join its bytes pair by pair, always the pair that comes first in the list of merges."""
        if word in self.cache:
            return self.cache[word]
        parts = [byte_symbols()[byte] for byte in word.encode("utf-8")]
        parts[-1] += WORD_END
        while len(parts) > 1:
            best = min(zip(parts, parts[1:]), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            join_pair(parts, best)
        self.cache[word] = [self.ids[part] for part in parts]
        return self.cache[word]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text of any length, without start and end; repaired first, as in OpenAI's CLIP."""
        import ftfy  # not on top: that takes 50 ms, also of --help

        text = html.unescape(html.unescape(ftfy.fix_text(text)))  # twice: &amp;lt; becomes <
        return [i for word in WORD.findall(text.lower()) for i in self.merge(word)]

    def decode(self, ids: Iterable[int]) -> str:
        """Token ids to text, a space between words; broken UTF-8 becomes U+FFFD. Raises IndexError for unknown ids."""
        symbols = "".join(self.tokens[i] for i in ids).replace(WORD_END, byte_symbols()[ord(" ")])
        byte_values = {symbol: byte for byte, symbol in byte_symbols().items()}
        return bytes(byte_values[symbol] for symbol in symbols).decode("utf-8", errors="replace").strip()

    def cut(self, text: str) -> str:
        """The part of a prompt that does not fit into its 75 tokens, decoded; "" if all of it fits."""
        return self.decode(self.encode(text)[MAX_LENGTH - 2 :])

    def __call__(self, prompts: list[str]) -> Tensor:
        """Prompts to ids int64 [B, 77]: start, up to 75 tokens, end, padded with more ends."""
        rows = [[self.start, *self.encode(prompt)[: MAX_LENGTH - 2]] for prompt in prompts]
        return torch.tensor([row + [self.end] * (MAX_LENGTH - len(row)) for row in rows])


@dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of a text transformer; the defaults are those of CLIP ViT-L/14, which SD 1.x uses."""

    vocab_size: int = 49_408
    width: int = 768
    mlp_width: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    max_length: int = MAX_LENGTH


class Layer(nn.Module):
    """A pre-norm transformer layer: attention, then an MLP, each added to its input."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config.width, config.num_heads, bias=True, causal=True)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp_in = nn.Linear(config.width, config.mlp_width)
        self.mlp_out = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        h = self.mlp_in(self.norm2(x))
        return x + self.mlp_out(h * torch.sigmoid(1.702 * h))  # CLIP's "quick GELU"


class CLIPTextModel(nn.Module):
    """Token ids to the context that the UNet attends to: all positions, after the final LayerNorm."""

    def __init__(self, config: CLIPTextConfig = CLIPTextConfig()):
        super().__init__()
        self.config = config
        # Not nn.Embedding(...): its initialisation takes a second on the meta device, where models are built to load.
        embedding = partial(nn.Embedding.from_pretrained, freeze=False)
        self.token_embedding = embedding(torch.randn(config.vocab_size, config.width))
        self.position_embedding = embedding(torch.randn(config.max_length, config.width))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm_out = nn.LayerNorm(config.width)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids int64 [B, N], N at most 77 -> context [B, N, D]."""
        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.norm_out(x)
