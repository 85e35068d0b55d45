"""LoRAs that are part of the base model: merged into its weights before anything else happens to them."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

from srpo.config.schema import ModelParams
from srpo.errors import UserError
from srpo.lineage.checkpoint_files import lora_file
from srpo.models.lora_files import read_lora
from srpo.models.merging import share_of_changes

log = logging.getLogger(__name__)
NETWORKS = ("unet", "text_encoder", "text_encoder_2")


def merge_base_loras(pipeline: StableDiffusionXLPipeline, model: ModelParams, dtype: torch.dtype) -> None:
    """Merge `model.loras` one after another into the networks that the pipeline has, which are in float32.

    Args:
        dtype: that the weights are cast to later; below float32 the share of the change that survives is logged.

    Raises:
        UserError: one can't be read or does not fit the base.
    """
    networks = {name: getattr(pipeline, name) for name in NETWORKS}
    originals: dict[torch.nn.Parameter, torch.Tensor] = {}
    for number, lora in enumerate(model.loras):
        key = f"model.loras.{number}"
        file = lora_file(key, Path(), lora.path)
        for network, layers in read_lora(key, file, networks).items():
            for module, layer in layers.items():
                weight = networks[network].get_submodule(module).weight
                originals.setdefault(weight, weight.data)
                try:
                    weight.data = layer.apply(weight.data, lora.scale)
                except RuntimeError:
                    raise UserError(
                        f"{key}: {file}: its layer {module} does not fit the base's {network}; take a LoRA of SDXL"
                    ) from None
    if dtype != torch.float32 and originals:
        share = 100 * share_of_changes(((original, weight.data) for weight, original in originals.items()), dtype)
        log.info("model.loras: merged; %.1f %% of their change survives in %s", share, str(dtype).split(".")[-1])
