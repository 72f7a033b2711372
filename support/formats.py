"""Names: what a file calls a network's tensors, in both directions, and errors that use the file's words."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from support.errors import UserError

from torch import Tensor

from support.kinds import likely_cause

# A rule is a pair of templates in which {i} and {j} stand for numbers. It applies to a name without its last part
# (weight, bias), and no name fits two rules of a layout.

Rules = list[tuple[str, str]]  # (ours, theirs)


def nest(ours: str, theirs: str, rules: Rules) -> Rules:
    """The rules of a submodule that is called `ours` here and `theirs` there."""
    return [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in rules]


@cache
def pattern(template: str) -> re.Pattern:
    return re.compile(re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{j\}", r"(?P<j>\d+)"))


def translate(name: str, rules: Rules) -> str | None:
    """A tensor name from the left side of the rules to the right one; None if no rule fits."""
    stem, _, leaf = name.rpartition(".")
    for left, right in rules:
        if match := pattern(left).fullmatch(stem):
            return f"{right.format(**match.groupdict())}.{leaf}"
    return None


@dataclass(frozen=True)
class Layout:
    """What a file calls the tensors of one network: `prefix`, then our name translated by `rules`.

    A name that no rule fits is the same in both. `kind` is the kind of file, "base model" or "ControlNet". Names that
    begin like one of `others` are not the network's. `mark` is a tensor that files in no other layout have.
    """

    name: str
    kind: str
    rules: Rules
    prefix: str = ""
    others: tuple[str, ...] = ()
    mark: str = ""

    def theirs(self, name: str) -> str:
        """Our name -> the file's."""
        translated = translate(name, self.rules)
        return name if translated is None else self.prefix + translated

    def ours(self, name: str) -> str:
        """The file's name -> ours."""
        reversed_rules = [(theirs, ours) for ours, theirs in self.rules]
        return translate(name.removeprefix(self.prefix), reversed_rules) or name

    def pick(self, tensors: Mapping[str, Tensor], source: str | Path) -> "Part":
        """The network's tensors out of all in a file. `source` names the file in errors."""
        own = [name for name in tensors if name.startswith(self.prefix) and not name.startswith(self.others)]
        advice = likely_cause(tensors, self.kind)
        return Part({self.ours(name): tensors[name] for name in own}, self, str(source), advice)


@dataclass(frozen=True)
class Part:
    """One network's tensors from a file, under our names, and what an error message needs to know about the file."""

    tensors: dict[str, Tensor]
    layout: Layout
    source: str
    advice: str  # the end of an error's message

    def error(self, name: str, problem: str, advice: str | None = None) -> UserError:
        """An error about one tensor, under the name that it has in the file."""
        return UserError(f"{self.source}: {self.layout.theirs(name)} {problem}{advice or self.advice}")

    def shape(self, name: str) -> list[int]:
        """Raises UserError when there is no such tensor."""
        if name not in self.tensors:
            raise self.error(name, "is missing")
        return list(self.tensors[name].shape)


def read_part(layouts: Sequence[Layout], tensors: Mapping[str, Tensor], source: str | Path) -> Part:
    """A network's tensors out of a file, in the one of the layouts that the file is in."""
    layout = next((layout for layout in layouts if layout.mark in tensors), layouts[0])
    return layout.pick(tensors, source)
