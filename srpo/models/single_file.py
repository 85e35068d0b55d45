"""SDXL checkpoints of one file in Stability's layout, as people share them; read without a network.

The folder `sdxl/` beside this module holds diffusers' configuration of SDXL 1.0 and the merges of CLIP's tokenizer
(published by OpenAI under the MIT license), from which the vocabulary follows.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from transformers import CLIPTokenizer

from srpo.lineage.checkpoint_files import read_header, scheduler_options

CONFIG = Path(__file__).parent / "sdxl"
TOKENS = 77
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


def clip_tokenizer(pad_token: str) -> CLIPTokenizer:
    """Return CLIP's tokenizer, which cuts at 77 tokens."""
    merges = gzip.decompress((CONFIG / "merges.txt.gz").read_bytes()).decode()
    letters = _byte_letters()
    words = ["".join(line.split()) for line in merges.splitlines()[1:]]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *words, "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "merges.txt").write_text(merges, encoding="utf-8")
        (Path(folder) / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS, pad_token=pad_token)


def _byte_letters() -> list[str]:
    """Return the printable letters that stand for the 256 bytes in byte-level BPE, in the vocabulary's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(code) for code in printable] + [chr(256 + number) for number in range(256 - len(printable))]
