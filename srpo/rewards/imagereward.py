"""ImageReward: a BLIP that reads picture and prompt together, from its own checkpoint, on transformers' BLIP."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from srpo.models.hub import Source, load_state, loading, sibling_or_default
from srpo.rewards.heads import load_head
from srpo.rewards.preprocess import Preprocess
from srpo.rewards.protocol import Pixels

FILE = "ImageReward.pt"
TOKENIZER = Source("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594")
TOKENS = 35
MEAN, SPREAD = 0.16717362830052426, 1.0333394966054072
HEAD = 64  # width of one attention head, in both of BLIP's halves


class ImageReward:
    """(r - 0.1672) / 1.0333, r an MLP's reading of BLIP-large's first token (Xu et al., 2023).

    Units: standard deviations over the authors' training pictures: mean 0, most within -2 to 2. Only the prompt's
    first 35 tokens are read. Preprocessing: shortest side to 224 bicubic, centre crop, OpenAI's mean and spread.
    Source: `zai-org/ImageReward` (formerly THUDM), file ImageReward.pt; the package of that name, which no longer
    imports sibling_or_default today's transformers, isn't needed. Licence: Apache-2.0. It has no features for FID.
    """

    def __init__(
        self, model: str, revision: str | None, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        """Load the checkpoint, and BERT's tokenizer from the same local folder, or from the Hub.

        Args:
            model: the .pt file, or a folder or Hub repository that holds it by its own name.

        Raises:
            UserError: one of the two can't be loaded.
        """
        source = Source(model, revision)
        state = load_state(source, FILE)
        with loading(source):
            self.vision = _vision(_below(state, "blip.visual_encoder.")).to(device, dtype).eval()
            self.text = _text(_below(state, "blip.text_encoder.")).to(device, dtype).eval()
            self.head = load_head(state, "mlp.").to(device)
        words = sibling_or_default(source, "vocab.txt", TOKENIZER)
        with loading(words):
            self.tokenizer = AutoTokenizer.from_pretrained(
                words.model, revision=words.revision, trust_remote_code=False
            )
        side = (self.vision.config.image_size,) * 2
        self.preprocess = Preprocess(size=side, crop=side)
        self.device, self.dtype = device, dtype

    @torch.inference_mode()
    def score(self, images: Pixels, prompts: Sequence[str]) -> torch.Tensor:
        """float32 [n]: the reward of image i for prompt i."""
        prepared = self.preprocess(images, self.device, self.dtype)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self.device)
        read = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=self.vision(pixel_values=prepared).last_hidden_state,
        ).last_hidden_state
        return ((self.head(read[:, 0].float()).squeeze(1) - MEAN) / SPREAD).cpu()


RENAMED = [
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
]


def _vision(state: dict[str, torch.Tensor]) -> BlipVisionModel:
    patch, width = state["patch_embed.proj.weight"].shape[-1], state["cls_token"].shape[-1]
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_count(state, "blocks."),
        num_attention_heads=width // HEAD,
        image_size=round((state["pos_embed"].shape[1] - 1) ** 0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    model = BlipVisionModel(config)
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    model.load_state_dict(renamed)
    return model


def _text(state: dict[str, torch.Tensor]) -> BlipTextModel:
    words, places = state["embeddings.word_embeddings.weight"], state["embeddings.position_embeddings.weight"]
    config = BlipTextConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        intermediate_size=state["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_count(state, "encoder.layer."),
        num_attention_heads=words.shape[1] // HEAD,
        max_position_embeddings=places.shape[0],
        encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        layer_norm_eps=1e-12,
        is_decoder=True,  # gives it the cross attention; it is called as an encoder all the same
    )
    model = BlipTextModel(config, add_pooling_layer=False)
    model.load_state_dict({name: value for name, value in state.items() if name != "embeddings.position_ids"})
    return model


def _below(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _count(state: Mapping[str, torch.Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})
