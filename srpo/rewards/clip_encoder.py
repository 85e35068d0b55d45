"""The CLIP that most rewards stand on: pictures and texts to embeddings, each prompt once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPProcessor, PreTrainedTokenizerBase

from srpo.models.hub import Source, load_complete, loading
from srpo.rewards.preprocess import Preprocess
from srpo.rewards.protocol import Pixels

TEXT_BATCH = 256
REMEMBERED = 16384


class ClipTower:
    """A CLIPModel with its tokenizer and preprocessing.

    It computes in `dtype`; embeddings leave it in float32, and cosines are taken in float32.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        preprocess: Preprocess,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.logit_scale = model.logit_scale.detach().float().exp().item()
        self.model = model.to(device, dtype).eval()
        self.tokenizer, self.preprocess = tokenizer, preprocess
        self.device, self.dtype = device, dtype
        self._texts: dict[str, torch.Tensor] = {}

    @classmethod
    def load(cls, source: Source, device: torch.device, dtype: torch.dtype) -> ClipTower:
        """A checkpoint in transformers' layout, preprocessing as its own settings say.

        Raises:
            UserError: it can't be loaded.
        """
        with loading(source):
            model = load_complete(CLIPModel, source.model, revision=source.revision, use_safetensors=True)
            processor = CLIPProcessor.from_pretrained(source.model, revision=source.revision)
            preprocess = Preprocess.from_config(processor.image_processor.to_dict())
        return cls(model, processor.tokenizer, preprocess, device, dtype)

    @torch.inference_mode()
    def images(self, images: Pixels) -> torch.Tensor:
        """float32 [n, dim] on the device: projected image embeddings, not normalised."""
        prepared = self.preprocess(images, self.device, self.dtype)
        return _pooled(self.model.get_image_features(pixel_values=prepared)).float()

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """float32 [n, dim] on the device: projected text embeddings of length 1; a repeated prompt costs nothing."""
        if len(self._texts) > REMEMBERED:
            self._texts.clear()
        missing = sorted(set(prompts) - self._texts.keys())
        length = self.model.config.text_config.max_position_embeddings
        for start in range(0, len(missing), TEXT_BATCH):
            part = missing[start : start + TEXT_BATCH]
            tokens = self.tokenizer(
                part, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
            ).to(self.device)
            found = _pooled(
                self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            )
            self._texts |= zip(part, normalize(found.float(), dim=-1), strict=True)
        return torch.stack([self._texts[prompt] for prompt in prompts])

    def cosine(self, images: Pixels, prompts: Sequence[str]) -> torch.Tensor:
        """float32 [n] on the CPU: cosine of image i and prompt i."""
        return (normalize(self.images(images), dim=-1) * self.texts(prompts)).sum(dim=-1).cpu()


def _pooled(output) -> torch.Tensor:
    # transformers 5 returns an object where 4 returned the tensor
    return getattr(output, "pooler_output", output)
