"""What a weight file is that does not fit, told by its tensors' names, and what to do."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from support.errors import warn

# What names tell, as a pattern. The first that is found counts, so special kinds come first: many have a ControlNet's
# or a base's names too.
KINDS = {
    "lora_controlnet": "a Control-LoRA",
    r"motion_modules\.": "AnimateDiff's SparseCtrl or motion module",
    "ctrl_to_base|control_to_base|enc_zero_convs_out": "a ControlNet-XS",
    r"adapter\.body\.|body\.0\.(block1|in_conv|resnets)\.": "a T2I-Adapter",
    r"ip_adapter\.|image_proj\.": "an IP-Adapter",
    "lllite_": "a ControlLLLite",
    r"lora_(up|down|A|B|linear_layer)|_lora\.|hada_w|lokr_w": "a LoRA, which only modifies a base model",
    "string_to_param|emb_params": "a textual inversion",
    r"scaled_fp8|scale_weight|weight_scale|\.absmax": "a quantised model, but only fp16, bf16 and fp32 are read",
    r"(double|joint|controlnet)_blocks\.|single_transformer_blocks\.": "a diffusion transformer such as Flux or SD 3",
    r"conditioner\.embedders\.|add_embedding\.|label_emb\.": "SDXL or made for it",
    r"cond_stage_model\.model\.": "Stable Diffusion 2.x",
}
SD2_CONTEXT = (1024,)  # the width of the prompt in Stable Diffusion 2.x
CONTROLNET = r"control_model\.|controlnet_cond_embedding\.|input_hint_block\.|hint_encoder\."
BASE = r"model\.diffusion_model\.|up_blocks\.|output_blocks\."


def likely_cause(tensors: Mapping[str, Tensor], controlnet: bool) -> str:
    """The end of an error about a file that does not fit as a ControlNet, or as a base."""
    names = "\n".join(tensors)
    kind = next((kind for pattern, kind in KINDS.items() if re.search(pattern, names)), "")
    if any(name.endswith("attn2.to_k.weight") and tensor.shape[1:] == SD2_CONTEXT for name, tensor in tensors.items()):
        kind = kind or "Stable Diffusion 2.x or made for it"
    is_base, is_controlnet = (re.search(pattern, names) for pattern in (BASE, CONTROLNET))
    if controlnet and is_base and not (kind or is_controlnet):
        return "; this looks like a base model, not a ControlNet: pass it as the base"
    if is_controlnet and not (kind or controlnet or is_base):
        return "; this looks like a ControlNet, not a base model: pass it as a ControlNet"
    told = f"; this looks like {kind}" if kind else ""
    if controlnet:
        return f"{told}; pass a whole ControlNet for Stable Diffusion 1.x, trained for a base of this size"
    return (f"{told}; pass a Stable Diffusion 1.x with all of UNet, VAE and text encoder, in one file or diffusers' "
            "folder; --vae brings a VAE alone")  # fmt: skip


def warn_of_pooling(source: str) -> None:
    """Other programs go by the name too: no tensor of such a file tells."""
    if "shuffle" in Path(source).name.lower():
        warn(f"{source}: the residuals of a ControlNet called shuffle are averaged over the picture elsewhere; here "
             "they are not, so that its pictures are wrong")  # fmt: skip
