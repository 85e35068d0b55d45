"""Prompts to conditioning, with SDXL's two text encoders.

A text encoder reads 77 tokens, two of which mark start and end. A longer prompt is cut off, or with
`model.long_prompts: chunk` divided every 75 tokens into chunks. Each chunk is encoded as a prompt of its own, the
tokens of all chunks are joined, and the pooled output is that of the first, as in ComfyUI. A prompt of one chunk is
encoded as diffusers does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from srpo.sampling.batch_invariant import tile_rows
from srpo.sampling.conditioning import PromptEmbeds

ROWS = 32  # chunks encoded at once, except by large encoders on a CPU


@torch.inference_mode()
def encode_prompts(
    pipeline: StableDiffusionXLPipeline, prompts: Sequence[str], *, chunked: bool, padded: bool
) -> PromptEmbeds:
    """Return the conditioning of n prompts and, as row n, that of the empty prompt.

    The empty prompt's is zero if the pipeline's `force_zeros_for_empty_prompt` is set.

    Args:
        pipeline: with tokenizers and text encoders.
        chunked: read long prompts to their end.
        padded: always encode the same number of chunks at once, so that a result does not depend on the prompts beside
            it.
    """
    texts = [*prompts, ""]
    ids_1, ids_2 = (
        [token_ids(tokenizer, text, chunked=chunked) for text in texts]
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
    )
    chunks = tuple(len(of_text) for of_text in ids_1)
    tokens, pooled = _encode(pipeline, list(chain(*ids_1)), list(chain(*ids_2)), padded)
    first = [sum(chunks[:row]) for row in range(len(chunks))]
    pooled = pooled[first]
    if pipeline.config.force_zeros_for_empty_prompt:
        tokens[-1] = 0
        pooled[-1] = 0
    return PromptEmbeds(tokens, pooled, () if max(chunks) == 1 else chunks)


def token_ids(tokenizer: Any, text: str, *, chunked: bool) -> list[list[int]]:
    """Return the ids of a text's chunks, each with start and end and padded to the tokenizer's length."""
    size = tokenizer.model_max_length - 2
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    parts = [ids[start : start + size] for start in range(0, len(ids) or 1, size)]
    return [
        [tokenizer.bos_token_id, *part, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * (size - len(part))]
        for part in (parts if chunked else parts[:1])
    ]


def _encode(
    pipeline: StableDiffusionXLPipeline, ids_1: list[list[int]], ids_2: list[list[int]], padded: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens [chunks, length, dim] and pooled [chunks, pooled_dim]."""
    tokens = []
    pooled = []
    rows = (
        min(tile_rows(encoder, ROWS) for encoder in (pipeline.text_encoder, pipeline.text_encoder_2))
        if padded
        else ROWS
    )
    for start in range(0, len(ids_1), rows):
        parts = [ids[start : start + rows] for ids in (ids_1, ids_2)]
        count = len(parts[0])
        if padded:
            parts = [part + part[-1:] * (rows - count) for part in parts]
        encoders = pipeline.text_encoder, pipeline.text_encoder_2
        ids = (torch.tensor(part, device=encoders[0].device) for part in parts)
        part_tokens, part_pooled = encode_ids(*encoders, *ids)
        tokens.append(part_tokens[:count])
        pooled.append(part_pooled[:count])
    return torch.cat(tokens), torch.cat(pooled)


def encode_ids(
    text_encoder: CLIPTextModel,
    text_encoder_2: CLIPTextModelWithProjection,
    first: torch.Tensor,
    second: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens [n, length, dim] and pooled [n, pooled_dim] of n chunks' ids, int64 [n, length] per encoder."""
    one = text_encoder(first, output_hidden_states=True)
    two = text_encoder_2(second, output_hidden_states=True)
    return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two[0]
