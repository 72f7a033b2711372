"""What files call a network's tensors; what was picked out of one, under our names; and loading that, strictly."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from names import CLIP, CONTROLNET, TABLES, Rules, translate
from support.errors import UserError
from vae import AutoencoderKL


@dataclass(frozen=True)
class Layout:
    """What a file calls the tensors of one network: `prefix`, then our name translated by `rules`.

    A name that no rule fits is the same in both. `name` is "official", "diffusers", or "own" for our names. `mark` is
    a tensor that files in no other layout have.
    """

    name: str
    rules: Rules
    prefix: str = ""
    mark: str = ""

    def theirs(self, name: str) -> str:
        """Our name -> the file's."""
        return self.prefix + translated if (translated := translate(name, self.rules)) else name

    def ours(self, name: str) -> str:
        """The file's name -> ours."""
        reversed_rules = [(theirs, ours) for ours, theirs in self.rules]
        return translate(name.removeprefix(self.prefix), reversed_rules) or name


OFFICIAL = {network: Layout("official", rules, prefix) for network, (prefix, rules) in TABLES.items()}
# The text encoder as some trainers write it, and old merges; a ControlNet and a VAE without prefix, as most are today;
# and our own names: in checkpoints, and for the lite ablation, which no other program knows.
SHORT = "cond_stage_model.transformer."
SHORT_TEXT = Layout("official", CLIP, SHORT, mark=f"{SHORT}final_layer_norm.weight")
BARE = Layout("official", CONTROLNET, mark="input_hint_block.0.weight")
BARE_VAE = Layout("official", TABLES[AutoencoderKL][1], mark="decoder.mid.attn_1.q.weight")
OWN = Layout("own", [], mark="hint_encoder.0.weight")


@dataclass(frozen=True)
class Part:
    """One network's tensors out of a file, under our names, and what errors and sizes need to know about the file."""

    tensors: dict[str, Tensor]
    layout: Layout
    source: str
    advice: str  # the end of an error's message: what the file seems to be, and what to do
    metadata: dict[str, str] = field(default_factory=dict)
    hidden: dict[str, object] = field(default_factory=dict)  # what the file says of sizes that no shape shows

    def error(self, name: str, problem: str, advice: str | None = None) -> UserError:
        """An error about one tensor, under the name that it has in the file."""
        return UserError(f"{self.source}: {self.layout.theirs(name)} {problem}{advice or self.advice}")

    def shape(self, name: str, dimensions: int = 4) -> list[int]:
        """Of a tensor that must be there, with so many dimensions."""
        if name not in self.tensors:
            raise self.error(name, "is missing")
        shape = list(self.tensors[name].shape)
        if len(shape) != dimensions or 0 in shape:
            raise self.error(name, f"has shape {shape}")
        return shape

    @property
    def lite(self) -> bool:
        return self.layout is OWN and "time_embed.0.weight" not in self.tensors


def load(module: nn.Module, part: Part) -> None:
    """Load all of the part's tensors into the module, which must have exactly these.

    Parameters on the meta device are replaced by the tensors themselves, in the parameter's dtype, so that
    memory-mapped tensors stay mapped. Other parameters are overwritten in place.
    """
    state = module.state_dict()
    for name, parameter in state.items():
        expected, tensor = list(parameter.shape), part.tensors.get(name)
        if tensor is None:
            raise part.error(name, f"{expected} is missing")
        if list(tensor.shape) != expected:
            raise part.error(name, f"has shape {list(tensor.shape)}, expected {expected}")
        if not tensor.is_floating_point():
            raise part.error(name, f"holds {tensor.dtype} numbers, not weights")
        if not tensor.sum(dtype=torch.float32).isfinite():  # NaN and inf stay in a sum, which makes no copy
            raise part.error(name, "has NaN or infinity in it", "; such a file is damaged: fetch or train it again")
    for name in sorted(part.tensors.keys() - state.keys()):
        raise part.error(name, f"{list(part.tensors[name].shape)} is no part of the model")
    values = {name: part.tensors[name].to(parameter.dtype) for name, parameter in state.items()}
    module.load_state_dict(values, assign=any(parameter.is_meta for parameter in state.values()))
