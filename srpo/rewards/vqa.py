"""VQAScore: a vision-language model asked whether the image shows the prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchvision.transforms.functional import to_pil_image
from transformers import AutoModelForImageTextToText, AutoProcessor

from srpo.models.hub import Source, loading
from srpo.rewards.protocol import Pixels

QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
ANSWER = "Yes"


class VqaScore:
    """VQAScore (Lin et al., 2024): the probability that the model's first word is Yes when asked QUESTION.

    Units: probability, 0 to 1. The paper's numbers are of CLIP-FlanT5; scales differ between models, so compare
    within one model only. Images are scored one at a time: padding would change the numbers.
    Preprocessing: the checkpoint's own, by its processor. Source: any image-text-to-text checkpoint of transformers
    with a chat template, such as `llava-hf/llava-1.5-7b-hf`; a 7-billion-parameter model takes 15 GB in half
    precision. License: the checkpoint's.
    """

    def __init__(
        self, model: str, revision: str | None, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        """Load a Hub id or local folder.

        Raises:
            UserError: it can't be loaded, or has no chat template.
        """
        with loading(Source(model, revision)):
            self.processor = AutoProcessor.from_pretrained(model, revision=revision, trust_remote_code=False)
            self.model = AutoModelForImageTextToText.from_pretrained(
                model, revision=revision, use_safetensors=True, dtype=dtype, trust_remote_code=False
            )
            if not self.processor.chat_template:
                raise ValueError("its processor has no chat template, so it can't be asked a question")
        self.model.to(device).eval()
        self.answer = self.processor.tokenizer.encode(ANSWER, add_special_tokens=False)[0]
        self.device = device
        self.dtype = dtype

    @torch.inference_mode()
    def score(self, images: Pixels, prompts: Sequence[str]) -> torch.Tensor:
        """Return the probability of Yes for image i and prompt i, float32 [n]."""
        return torch.tensor([self._ask(image, prompt) for image, prompt in zip(images, prompts, strict=True)])

    def _ask(self, image: torch.Tensor, prompt: str) -> float:
        content = [{"type": "image"}, {"type": "text", "text": QUESTION.format(prompt=prompt)}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self.processor(images=to_pil_image(image.cpu()), text=text, return_tensors="pt")
        logits = self.model(**inputs.to(self.device, self.dtype)).logits[0, -1]
        return logits.float().softmax(dim=-1)[self.answer].item()
