"""Small random checkpoints in each family's published file format."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
)

from tests.support.world import LENGTH, _tokenizer

VOCABULARY = 514
SIDE, PATCH = 28, 14


def clip_folder(folder: Path, **processor) -> Path:
    """transformers' layout: config, model.safetensors, tokenizer, preprocessor_config.json."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, projection_dim=16, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH, projection_dim=16,
    )  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    settings = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}} | processor
    CLIPProcessor(CLIPImageProcessor(**settings), _tokenizer(folder / "words")).save_pretrained(folder)
    return folder


def open_clip_state() -> dict[str, torch.Tensor]:
    """The names and shapes of open_clip's ViT-H-14, with heads 80 and 64 wide as there, but two of each."""
    make = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 0.15) -> torch.Tensor:
        return std * torch.randn(shape, generator=make)

    def norm(name: str, width: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 1 + normal(width), f"{name}.bias": normal(width)}

    def blocks(prefix: str, width: int) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for layer in range(2):
            at = f"{prefix}transformer.resblocks.{layer}"
            found |= norm(f"{at}.ln_1", width) | norm(f"{at}.ln_2", width)
            found |= {
                f"{at}.attn.in_proj_weight": normal(3 * width, width),
                f"{at}.attn.in_proj_bias": normal(3 * width),
            }
            for name, out, wide in (
                ("attn.out_proj", width, width),
                ("mlp.c_fc", 4 * width, width),
                ("mlp.c_proj", width, 4 * width),
            ):
                found |= {f"{at}.{name}.weight": normal(out, wide, std=0.05), f"{at}.{name}.bias": normal(out)}
        return found

    wide, narrow, out = 160, 128, 24
    return {
        "positional_embedding": normal(LENGTH, narrow),
        "text_projection": normal(narrow, out),
        "logit_scale": torch.tensor(4.6),
        "visual.class_embedding": normal(wide),
        "visual.positional_embedding": normal((SIDE // PATCH) ** 2 + 1, wide),
        "visual.proj": normal(wide, out),
        "visual.conv1.weight": normal(wide, 3, PATCH, PATCH, std=0.05),
        **norm("visual.ln_pre", wide),
        **blocks("visual.", wide),
        **norm("visual.ln_post", wide),
        **blocks("", narrow),
        "token_embedding.weight": normal(VOCABULARY, narrow),
        **norm("ln_final", narrow),
    }  # fmt: skip


def hps_folder(folder: Path, file: str) -> Path:
    """The checkpoint as xswu/HPSv2 has it, with the tokenizer beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    _tokenizer(folder / "words").save_pretrained(folder)
    torch.save({"epoch": 1, "name": "x", "state_dict": open_clip_state()}, folder / file)
    return folder


def head_state(width: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """The MLP of the aesthetic predictor and of ImageReward."""
    make, found = torch.Generator().manual_seed(1), {}
    sizes = [width, 1024, 128, 64, 16, 1]
    for index, wide, out in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        found[f"{prefix}layers.{index}.weight"] = torch.randn(out, wide, generator=make) / wide**0.5
        found[f"{prefix}layers.{index}.bias"] = 0.1 * torch.randn(out, generator=make)
    return found


def aesthetic_folder(folder: Path) -> Path:
    """The MLP's file with its CLIP beside it."""
    clip_folder(folder)
    torch.save(head_state(16), folder / "sac+logos+ava1-l14-linearMSE.pth")
    return folder


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "green", "blue", "circle", "square", "very"]


def imagereward_folder(folder: Path) -> Path:
    """BLIP in its own names (a timm ViT and a BERT with cross attention), the MLP, and BERT's vocabulary."""
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    make, wide, narrow = torch.Generator().manual_seed(2), 128, 64
    state: dict[str, torch.Tensor] = {}

    def linear(name: str, out: int, width: int) -> None:
        state[f"blip.{name}.weight"] = 0.1 * torch.randn(out, width, generator=make)
        state[f"blip.{name}.bias"] = 0.1 * torch.randn(out, generator=make)

    def norm(name: str, width: int) -> None:
        state[f"blip.{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=make)
        state[f"blip.{name}.bias"] = 0.1 * torch.randn(width, generator=make)

    places = (SIDE // PATCH) ** 2 + 1
    state["blip.visual_encoder.cls_token"] = torch.randn(1, 1, wide, generator=make)
    state["blip.visual_encoder.pos_embed"] = torch.randn(1, places, wide, generator=make)
    state["blip.visual_encoder.patch_embed.proj.weight"] = 0.05 * torch.randn(wide, 3, PATCH, PATCH, generator=make)
    state["blip.visual_encoder.patch_embed.proj.bias"] = torch.randn(wide, generator=make)
    for layer in range(2):
        at = f"visual_encoder.blocks.{layer}"
        norm(f"{at}.norm1", wide)
        norm(f"{at}.norm2", wide)
        linear(f"{at}.attn.qkv", 3 * wide, wide)
        linear(f"{at}.attn.proj", wide, wide)
        linear(f"{at}.mlp.fc1", 4 * wide, wide)
        linear(f"{at}.mlp.fc2", wide, 4 * wide)
    norm("visual_encoder.norm", wide)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(48)[None]
    state["blip.text_encoder.embeddings.word_embeddings.weight"] = torch.randn(len(WORDS), narrow, generator=make)
    state["blip.text_encoder.embeddings.position_embeddings.weight"] = torch.randn(48, narrow, generator=make)
    norm("text_encoder.embeddings.LayerNorm", narrow)
    for layer in range(2):
        at = f"text_encoder.encoder.layer.{layer}"
        for kind, width in (("attention", narrow), ("crossattention", wide)):
            linear(f"{at}.{kind}.self.query", narrow, narrow)
            linear(f"{at}.{kind}.self.key", narrow, width)
            linear(f"{at}.{kind}.self.value", narrow, width)
            linear(f"{at}.{kind}.output.dense", narrow, narrow)
            norm(f"{at}.{kind}.output.LayerNorm", narrow)
        linear(f"{at}.intermediate.dense", 2 * narrow, narrow)
        linear(f"{at}.output.dense", narrow, 2 * narrow)
        norm(f"{at}.output.LayerNorm", narrow)
    linear("vision_proj", 256, wide)  # left over from pre-training, not part of the reward
    linear("text_proj", 256, narrow)
    torch.save(state | head_state(narrow, "mlp."), folder / "ImageReward.pt")
    return folder


def llava_folder(folder: Path) -> Path:
    """LLaVA's layout in transformers: a CLIP vision tower, a Llama, a processor with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    words = [
        "<unk>", "<s>", "<pad>", "<image>", "Yes", "No", "USER", "ASSISTANT", "a", "red", "blue", "circle", "Does",
        "this", "figure", "show", "Please", "answer", "yes", "or", "no", ":", '"', "?", ".",
    ]  # fmt: skip
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH,
    )  # fmt: skip
    language = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=2, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=language, image_token_index=words.index("<image>"))
    model = LlavaForConditionalGeneration(config)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    template = (
        "{% for message in messages %}USER : {% for part in message.content %}"
        "{{ '<image> ' if part.type == 'image' else part.text }}{% endfor %}{% endfor %} ASSISTANT :"
    )
    size = {"shortest_edge": SIDE}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=fast, patch_size=PATCH, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    return folder
