"""SDXL checkpoints of one file in Stability's layout, as people share them; read without a network.

The folder `sdxl/` beside this module holds diffusers' configuration of SDXL 1.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

from srpo.lineage.checkpoint_files import read_header, scheduler_options
from srpo.models.tokenizer import CONFIG, clip_tokenizer

PAD_TOKENS = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}


def load_single_file(file: Path, dtype: torch.dtype, config: Path = CONFIG, **parts: Any) -> StableDiffusionXLPipeline:
    """Load a pipeline from one `.safetensors` file, with v-prediction and zero terminal SNR as its keys mark them.

    Args:
        file: an SDXL checkpoint in Stability's layout.
        config: the configuration's folder in diffusers' layout.
        parts: parts that are loaded already; None leaves a part out.

    Raises:
        Exception: whatever diffusers raises for a file that does not fit.
    """
    tokenizers = {name: clip_tokenizer(pad) for name, pad in PAD_TOKENS.items() if name not in parts}
    scheduler = EulerDiscreteScheduler.from_pretrained(
        config, subfolder="scheduler", **scheduler_options(read_header(file))
    )
    return StableDiffusionXLPipeline.from_single_file(
        str(file),
        config=str(config),
        local_files_only=True,
        torch_dtype=dtype,
        scheduler=scheduler,
        add_watermarker=False,
        **tokenizers,
        **parts,
    )
