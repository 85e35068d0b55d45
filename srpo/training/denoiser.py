"""The networks of a training step in one module, so that several processes average the gradients of all at once."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from srpo.sampling.conditioning import Conditioning
from srpo.sampling.text_encoding import encode_ids


class TokenIds(NamedTuple):
    """Texts of n samples, in equally many chunks each, that are encoded in the step.

    Attributes:
        first: ids of the first tokenizer, int64 [n, chunks, length]; `second` are those of the second.
        kept: float32 [n], 0 for texts whose conditioning is zero, else 1.
    """

    first: torch.Tensor
    second: torch.Tensor
    kept: torch.Tensor


class Denoiser(torch.nn.Module):
    """The UNet and, where they are trained, the text encoders before it."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel | None = None,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
    ) -> None:
        super().__init__()
        self.unet = unet
        if text_encoder is not None and text_encoder_2 is not None:
            self.text_encoder = text_encoder
            self.text_encoder_2 = text_encoder_2

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, text: Conditioning | TokenIds, time_ids: torch.Tensor
    ) -> torch.Tensor:
        """Return the UNet's prediction.

        Args:
            text: the conditioning, or what the text encoders make it from.
            time_ids: SDXL's size conditioning [n, 6].
        """
        tokens, pooled = self._encode(text) if isinstance(text, TokenIds) else text
        conditions = {"text_embeds": pooled, "time_ids": time_ids}
        return self.unet(noisy, timesteps, tokens, added_cond_kwargs=conditions, return_dict=False)[0]

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass."""
        self.unet.enable_gradient_checkpointing()
        for name, network in self.named_children():
            if name != "unet":
                cast(PreTrainedModel, network).gradient_checkpointing_enable()

    def _encode(self, text: TokenIds) -> Conditioning:
        count, chunks, _ = text.first.shape
        tokens, pooled = encode_ids(
            self.text_encoder, self.text_encoder_2, text.first.flatten(0, 1), text.second.flatten(0, 1)
        )
        tokens, pooled = tokens.reshape(count, -1, tokens.shape[-1]), pooled.view(count, chunks, -1)[:, 0]
        # zeroed texts are encoded, too: processes wait for a gradient of every parameter in each pass
        kept = text.kept.to(tokens.dtype)
        return Conditioning(tokens * kept[:, None, None], pooled * kept[:, None])
