"""What a weight file is that does not fit, told by its tensors' names, and what to do."""

import sys
from collections.abc import Mapping
from pathlib import Path

from support.errors import UserError

from torch import Tensor

ONLY = "only Stable Diffusion 1.x and its descendants fit"
MODIFIES = "it only modifies a base model, so pass a full checkpoint"
# Fragments of names, the kind of file, what to do. The first that is found counts, so special kinds come first: many
# have a ControlNet's or a base's names too.
KINDS = [
    (("scaled_fp8", "scale_weight", "weight_scale", ".absmax", ".quant_state"), "a quantised model",
     "pass one in fp16 or fp32"),
    (("lora_controlnet",), "a Control-LoRA", "pass the full ControlNet"),
    (("motion_modules.",), "AnimateDiff's SparseCtrl or motion module", "pass a ControlNet for single pictures"),
    (("ctrl_to_base", "control_to_base", "enc_zero_convs_out"), "a ControlNet-XS", "pass a ControlNet"),
    (("control_add_embedding.",), "a union ControlNet for SDXL", ONLY),
    (("adapter.body.", "body.0.block1.", "body.0.in_conv.", "body.0.resnets."), "a T2I-Adapter", "pass a ControlNet"),
    (("ip_adapter.", "image_proj."), "an IP-Adapter", "pass a ControlNet or a base"),
    (("lllite_",), "a ControlLLLite", "pass a ControlNet"),
    (("brushnet_",), "BrushNet", "pass a ControlNet"),
    (("lora_up", "lora_down", "lora_A", "lora_B", "_lora.", "lora_linear_layer", "hada_w", "lokr_w"), "a LoRA",
     MODIFIES),
    (("string_to_param", "emb_params"), "a textual inversion", MODIFIES),
    (("double_blocks.", "joint_blocks.", "single_transformer_blocks.", "controlnet_blocks."),
     "a diffusion transformer such as Flux or SD 3", ONLY),
    (("conditioner.embedders.", "add_embedding.", "label_emb."), "SDXL or made for it", ONLY),
    (("cond_stage_model.model.",), "Stable Diffusion 2.x", ONLY),
]  # fmt: skip
SD2_CONTEXT = 1024  # the width of the prompt in Stable Diffusion 2.x
CONTROLNET = ("control_model.", "controlnet_cond_embedding.", "input_hint_block.", "hint_encoder.")
BASE = ("model.diffusion_model.", "up_blocks.", "output_blocks.")


def likely_cause(tensors: Mapping[str, Tensor], wanted: str) -> str:
    """The end of an error about a file that does not fit as `wanted`: what it probably is, and what to do."""

    def has(fragments: tuple[str, ...]) -> bool:
        return any(fragment in name for name in tensors for fragment in fragments)

    for fragments, kind, remedy in KINDS:
        if has(fragments):
            return f"; this looks like {kind}: {remedy}"
    context = next((tensor for name, tensor in tensors.items() if name.endswith("attn2.to_k.weight")), None)
    if context is not None and context.shape[-1] == SD2_CONTEXT:
        return f"; this looks like Stable Diffusion 2.x or made for it: {ONLY}"
    if wanted == "ControlNet":
        if has(BASE) and not has(CONTROLNET):
            return "; this looks like a base model, not a ControlNet: pass it as the base"
        return "; pass a whole ControlNet for Stable Diffusion 1.x, trained for a base of this size"
    if has(CONTROLNET) and not has(BASE):
        return "; this looks like a ControlNet, not a base model: pass it as a ControlNet"
    if has(("up_blocks.",)) and not has(("model.diffusion_model.",)):
        return "; this looks like one network of a base in diffusers' layout: pass the folder with all of them"
    if not (has(("model.diffusion_model.",)) and has(("first_stage_model.",)) and has(("cond_stage_model.",))):
        return "; not all of UNet, VAE and text encoder are in this file: pass a full checkpoint"
    return "; pass a checkpoint of Stable Diffusion 1.x"


def refuse_differences(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError for a file that fits by all its names, but holds weights to be added to a base's."""
    if "difference" in tensors:
        raise UserError(f"{path} holds differences to a base's weights, not weights: pass the full ControlNet that "
                        "they were extracted from")  # fmt: skip


def warn_of_pooling(path: str | Path) -> None:
    """Other programs go by the name too: no tensor of such a file tells."""
    if "shuffle" in Path(path).name.lower():
        print(
            f"warning: {path}: the residuals of a ControlNet called shuffle are averaged over the picture elsewhere; "
            "here they are not, so that its pictures are wrong",
            file=sys.stderr,
        )
