"""What a weight file is that does not fit, told by its tensors' names, and what to do."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from support.errors import warn

ONLY = "only Stable Diffusion 1.x and its descendants fit"
# Fragments of names, the kind of file, what to do. The first that is found counts, so special kinds come first: many
# have a ControlNet's or a base's names too.
KINDS = [
    (("lora_controlnet",), "a Control-LoRA", "pass the full ControlNet"),
    (("motion_modules.",), "AnimateDiff's SparseCtrl or motion module", "pass a ControlNet for single pictures"),
    (("ctrl_to_base", "control_to_base", "enc_zero_convs_out"), "a ControlNet-XS", "pass a ControlNet"),
    (("adapter.body.", "body.0.block1.", "body.0.in_conv.", "body.0.resnets."), "a T2I-Adapter", "pass a ControlNet"),
    (("ip_adapter.", "image_proj."), "an IP-Adapter", "pass a ControlNet or a base"),
    (("lllite_",), "a ControlLLLite", "pass a ControlNet"),
    (("lora_up", "lora_down", "lora_A", "lora_B", "_lora.", "lora_linear_layer", "hada_w", "lokr_w"), "a LoRA",
     "it only modifies a base model, so pass a full checkpoint"),
    (("string_to_param", "emb_params"), "a textual inversion", "pass a full checkpoint"),
    (("scaled_fp8", "scale_weight", "weight_scale", ".absmax"), "a quantised model", "pass one in fp16 or fp32"),
    (("double_blocks.", "joint_blocks.", "single_transformer_blocks.", "controlnet_blocks."),
     "a diffusion transformer such as Flux or SD 3", ONLY),
    (("conditioner.embedders.", "add_embedding.", "label_emb."), "SDXL or made for it", ONLY),
    (("cond_stage_model.model.",), "Stable Diffusion 2.x", ONLY),
]  # fmt: skip
SD2_CONTEXT = (1024,)  # the width of the prompt in Stable Diffusion 2.x
CONTROLNET = ("control_model.", "controlnet_cond_embedding.", "input_hint_block.", "hint_encoder.")
BASE = ("model.diffusion_model.", "up_blocks.", "output_blocks.")


def likely_cause(tensors: Mapping[str, Tensor], controlnet: bool) -> str:
    """The end of an error about a file that does not fit as a ControlNet, or as a base."""

    def has(*fragments: str) -> bool:
        return any(fragment in name for name in tensors for fragment in fragments)

    for fragments, kind, remedy in KINDS:
        if has(*fragments):
            return f"; this looks like {kind}: {remedy}"
    if any(name.endswith("attn2.to_k.weight") and tensor.shape[1:] == SD2_CONTEXT for name, tensor in tensors.items()):
        return f"; this looks like Stable Diffusion 2.x or made for it: {ONLY}"
    is_base, is_controlnet = has(*BASE), has(*CONTROLNET)
    if controlnet and is_base and not is_controlnet:
        return "; this looks like a base model, not a ControlNet: pass it as the base"
    if controlnet:
        return "; pass a whole ControlNet for Stable Diffusion 1.x, trained for a base of this size"
    if is_controlnet and not is_base:
        return "; this looks like a ControlNet, not a base model: pass it as a ControlNet"
    return ("; pass a Stable Diffusion 1.x with all of UNet, VAE and text encoder, in one file or diffusers' folder; "
            "--vae brings a VAE alone")  # fmt: skip


def warn_of_pooling(source: str) -> None:
    """Other programs go by the name too: no tensor of such a file tells."""
    if "shuffle" in Path(source).name.lower():
        warn(f"{source}: the residuals of a ControlNet called shuffle are averaged over the picture elsewhere; here "
             "they are not, so that its pictures are wrong")  # fmt: skip
