"""CLIP: images and texts to embeddings, and their similarity, for any checkpoint in transformers' CLIPModel layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPProcessor, PreTrainedTokenizerBase

from srpo.models.hub import Source, load_complete, loading
from srpo.rewards.preprocess import Preprocess
from srpo.rewards.protocol import Pixels

TEXT_BATCH = 256
CACHED_PROMPTS = 16384


class ClipEncoder:
    """A CLIPModel with its tokenizer and preprocessing; most rewards are built on one.

    It computes in `dtype`; embeddings are returned in float32, and cosines are taken in float32.
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
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.device = device
        self.dtype = dtype
        self._text_embeddings: dict[str, torch.Tensor] = {}

    @classmethod
    def load(cls, source: Source, device: torch.device, dtype: torch.dtype) -> ClipEncoder:
        """Load a checkpoint in transformers' layout, with the preprocessing of its own settings.

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
        """Return the projected image embeddings, float32 [n, dim] on the device, not normalized."""
        prepared = self.preprocess(images, self.device, self.dtype)
        return _pooled(self.model.get_image_features(pixel_values=prepared)).float()

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return the projected text embeddings, float32 [n, dim] on the device, of length 1. They are cached."""
        if len(self._text_embeddings) > CACHED_PROMPTS:
            self._text_embeddings.clear()
        missing = sorted(set(prompts) - self._text_embeddings.keys())
        length = self.model.config.text_config.max_position_embeddings
        for start in range(0, len(missing), TEXT_BATCH):
            part = missing[start : start + TEXT_BATCH]
            tokens = self.tokenizer(
                part, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
            ).to(self.device)
            embeddings = _pooled(
                self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            )
            self._text_embeddings |= zip(part, normalize(embeddings.float(), dim=-1), strict=True)
        return torch.stack([self._text_embeddings[prompt] for prompt in prompts])

    def prepare(self, batches: Iterable[Sequence[str]]) -> None:
        """Forget all texts, and embed those of these batches, batch by batch.

        Embeddings may depend on the batch in the last bit, and through the cache on the batches before it. After this
        they depend on these batches only.
        """
        self._text_embeddings.clear()
        for prompts in batches:
            self.texts(prompts)

    def cosine(self, images: Pixels, prompts: Sequence[str]) -> torch.Tensor:
        """Return the cosine of image i and prompt i, float32 [n] on the CPU, -1 to 1."""
        return (normalize(self.images(images), dim=-1) * self.texts(prompts)).sum(dim=-1).cpu()


class ClipReward:
    """CLIPScore without its clipping at zero (Hessel et al., 2021): 100 * cosine(image, text).

    Units: hundredths of a cosine, -100 to 100; with OpenAI's ViT-L/14 a matching prompt gives about 20 to 35.
    Preprocessing: the checkpoint's own settings (resize or not, crop or not, mean and standard deviation), on tensors.
    Source: `openai/clip-vit-large-patch14` or any other CLIPModel checkpoint. License: OpenAI's code is MIT; its
    model card puts deployed use out of scope.
    """

    def __init__(
        self, model: str, revision: str | None, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        """Load a Hub id or local folder.

        Raises:
            UserError: it can't be loaded.
        """
        self.encoder = ClipEncoder.load(Source(model, revision), device, dtype)

    def score(self, images: Pixels, prompts: Sequence[str]) -> torch.Tensor:
        """Return 100 * cosine of image i and prompt i, float32 [n]."""
        return 100 * self.encoder.cosine(images, prompts)

    def prepare(self, batches: Iterable[Sequence[str]]) -> None:
        """Embed the prompts of these batches, of which the images will be scored in any order."""
        self.encoder.prepare(batches)

    def features(self, images: Pixels) -> torch.Tensor:
        """Return the projected image embeddings, float32 [n, dim], not normalized."""
        return self.encoder.images(images).cpu()


def _pooled(output: Any) -> torch.Tensor:
    # transformers 5 returns an object where 4 returned the tensor
    return getattr(output, "pooler_output", output)
