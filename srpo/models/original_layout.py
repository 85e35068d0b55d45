"""Tensors of an SDXL pipeline under the names of Stability's layout: one file for ComfyUI, A1111 and Forge.

The inverse of diffusers' `from_single_file`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from diffusers import (
    AutoencoderKL,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from srpo.lineage.checkpoint_files import EDM_MEAN, EDM_SCALING_FACTOR, EDM_SIGMA_MAX, EDM_SIGMA_MIN, EDM_STD

State = Mapping[str, torch.Tensor]
UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT = "conditioner.embedders.0.transformer."
TEXT_2 = "conditioner.embedders.1.model."
UNET_NAMES = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}
RESNET_NAMES = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
VAE_NAMES = {
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "conv_shortcut.": "nin_shortcut.",
    "conv_norm_out.": "norm_out.",
    "downsamplers.0.": "downsample.",
    "upsamplers.0.": "upsample.",
}
VAE_ATTENTION_NAMES = {"group_norm.": "norm.", "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "proj_out."}
OPEN_CLIP_NAMES = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
    "final_layer_norm.": "ln_final.",
}


def to_original_layout(pipeline: StableDiffusionXLPipeline) -> dict[str, torch.Tensor]:
    """Return all tensors by their original names, with the markers of v-prediction, zero terminal SNR and EDM."""
    state = {
        UNET + original_unet_name(pipeline.unet, name): value for name, value in pipeline.unet.state_dict().items()
    }
    state |= {VAE + name: value for name, value in _vae_state(pipeline.vae).items()}
    state |= {TEXT + _text_name(name): value for name, value in pipeline.text_encoder.state_dict().items()}
    state |= {TEXT_2 + name: value for name, value in _open_clip_state(pipeline.text_encoder_2.state_dict()).items()}
    config = pipeline.scheduler.config
    if isinstance(pipeline.scheduler, EDMEulerScheduler | EDMDPMSolverMultistepScheduler):
        state |= _edm_markers(pipeline)
    elif config.get("prediction_type") == "v_prediction":
        state["v_pred"] = torch.tensor([])
    if config.get("rescale_betas_zero_snr"):
        state["ztsnr"] = torch.tensor([])
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def _edm_markers(pipeline: StableDiffusionXLPipeline) -> dict[str, torch.Tensor]:
    """Return what programs know an EDM base by: the limits of sigma for v, the latents' statistics for epsilon."""
    config, vae = pipeline.scheduler.config, pipeline.vae.config
    if config.prediction_type == "v_prediction":
        return {EDM_SIGMA_MAX: torch.tensor(config.sigma_max), EDM_SIGMA_MIN: torch.tensor(config.sigma_min)}
    mean = torch.tensor(vae.latents_mean or [0.0] * 4).view(1, -1, 1, 1)
    std = torch.tensor(vae.latents_std or [1.0] * 4).view(1, -1, 1, 1)
    return {EDM_MEAN: mean, EDM_STD: std * EDM_SCALING_FACTOR / vae.scaling_factor}


def _replace(name: str, names: Mapping[str, str]) -> str:
    for ours, original in names.items():
        name = name.replace(ours, original)
    return name


def original_unet_name(unet: UNet2DConditionModel, name: str) -> str:
    """Return the original name of a tensor: the blocks of each side are numbered through, samplers included."""
    layers = unet.config.layers_per_block
    if found := re.fullmatch(
        r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name
    ):
        side, part, rest = found[1], found[3], found[5]
        block, layer = int(found[2]), int(found[4])
        if part == "resnets":
            rest = _replace(rest, RESNET_NAMES)
        if side == "down":
            number = 1 + block * (layers + 1) + (layers if part == "downsamplers" else layer)
            place = "1." if part == "attentions" else "0."
            return f"input_blocks.{number}.{place}{rest.replace('conv.', 'op.') if part == 'downsamplers' else rest}"
        number = block * (layers + 1) + (layers if part == "upsamplers" else layer)
        last = "2." if "CrossAttn" in unet.config.up_block_types[block] else "1."
        return f"output_blocks.{number}.{ {'resnets': '0.', 'attentions': '1.', 'upsamplers': last}[part] }{rest}"
    if name.startswith("mid_block.resnets."):
        name = _replace(name, RESNET_NAMES)
    start = next(ours for ours in UNET_NAMES if name.startswith(ours))
    return UNET_NAMES[start] + name.removeprefix(start)


def _vae_state(vae: AutoencoderKL) -> dict[str, torch.Tensor]:
    last = len(vae.config.block_out_channels) - 1
    state = {}
    for name, value in vae.state_dict().items():
        if ".attentions." in name:
            name = _replace(name, VAE_ATTENTION_NAMES)
            if value.ndim == 2:  # a convolution of size 1 there
                value = value[:, :, None, None]
        name = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", _replace(name, VAE_NAMES))
        name = re.sub(r"up_blocks\.(\d+)\.", lambda found: f"up.{last - int(found[1])}.", name)
        state[re.sub(r"\.resnets\.(\d+)\.", r".block.\1.", name)] = value
    return state


def _text_name(name: str) -> str:
    return name if name.startswith("text_model.") else f"text_model.{name}"


def _open_clip_state(state: State) -> dict[str, torch.Tensor]:
    """Return OpenCLIP's tensors, which hold query, key and value in one."""
    found: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            found["text_projection"] = value.T
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            parts = [_part(state, f"encoder.layers.{match[1]}.self_attn.{part}_proj.{match[2]}") for part in "qkv"]
            found[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = torch.cat(parts)
        elif not re.search(r"\.[kv]_proj\.|position_ids", name):
            found[_replace(name, OPEN_CLIP_NAMES)] = value
    return found


def _part(state: State, name: str) -> torch.Tensor:
    return state[name] if name in state else state[f"text_model.{name}"]
