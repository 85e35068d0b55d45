"""A project folder with random weights: the real classes and file formats, small enough for unit tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from demo.base import make_scheduler
from srpo.config.schema import SamplingParams
from srpo.data import parquet
from srpo.data.images import encode_image
from srpo.data.schemas import IMAGE

REPO = Path(__file__).parents[2]
COLORS, SHAPES = ["red", "green", "blue"], ["circle", "square"]
SIZE, LENGTH = 32, 16
TARGET_MODULES = (
    "  target_modules: [to_q, to_k, to_v, to_out.0, conv1, conv2, ff.net.0.proj, ff.net.2, proj_in, proj_out]\n"
)


def build_world(root: Path) -> Path:
    """Write params.yaml, dvc.yaml and data/ (base, reward, judge, templates, prompts, reference) under root."""
    torch.manual_seed(0)
    data = root / "data"
    tokenizer = _tokenizer(root / "vocab")
    _pipeline(tokenizer).save_pretrained(data / "base", safe_serialization=True)
    for name, width in {"reward": 16, "judge": 32}.items():
        _clip(width).save_pretrained(data / name, safe_serialization=True)
        size = {"height": SIZE, "width": SIZE}
        processor = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
        CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(data / name)
    shutil.rmtree(root / "vocab")
    texts = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]
    write_prompts(data / "prompts" / "train.jsonl", texts[:4], "train")
    write_prompts(data / "prompts" / "eval.jsonl", texts[4:], "eval")
    images = np.random.default_rng(0).integers(0, 255, (12, SIZE, SIZE, 3), dtype=np.uint8)
    fields = {"image": IMAGE, "prompt": pa.string()}
    rows = [{"image": encode_image(pixels), "prompt": texts[i % 6]} for i, pixels in enumerate(images)]
    parquet.write_table(data / "reference" / "reference.parquet", rows, fields)
    parquet.write_table(data / "templates.parquet", rows[:6], fields)
    shutil.copy(REPO / "dvc.yaml", root)
    write_params(root)
    return root


def write_prompts(path: Path, texts: list[str], prefix: str) -> None:
    """A prompt file with ids `<prefix>-0000` and so on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": f"{prefix}-{i:04d}", "prompt": text}) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")


def write_params(root: Path) -> None:
    """The shipped params.yaml at unit-test size."""
    text = (REPO / "params.yaml").read_text()
    changes = {
        "num_inference_steps: 8": "num_inference_steps: 3",
        "candidates_per_prompt: 8": "candidates_per_prompt: 3",
        "prompts_per_shard: 50": "prompts_per_shard: 2",
        "height: 64": f"height: {SIZE}",
        "width: 64": f"width: {SIZE}",
        "images_per_prompt: 6": "images_per_prompt: 2",
        "guidance_scales: [2.0, 3.0]": "guidance_scales: [1.0, 2.0]",
        "guidance_scale: 3.0": "guidance_scale: 2.0",
        "guidance_scale: 1.0": "guidance_scale: 1.5",
        "  prompts_per_round: 200\n": "",
        "steps: 300": "steps: 3",
        "batch_size: 16": "batch_size: 4",
        "replay: 0.5": "replay: 0.0",
        "rank: 16": "rank: 2",
        TARGET_MODULES: "",
        'kind: "demo.judge:SceneJudge"': "kind: templates, model: data/templates.parquet",
        "  diversity_judge: accuracy  # variety of what the prompt leaves open, among right images\n": "",
    }
    for old, new in changes.items():
        assert old in text, f"params.yaml no longer holds {old!r}"
        text = text.replace(old, new)
    (root / "params.yaml").write_text(text)


def sampling_params(steps: int = 3, guidance: float = 2.0, **options: Any) -> SamplingParams:
    """Return settings at the world's image size."""
    return SamplingParams(num_inference_steps=steps, guidance_scale=guidance, height=SIZE, width=SIZE, **options)


def _tokenizer(folder: Path) -> CLIPTokenizer:
    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(33, 127)] + [chr(code) for code in range(161, 256) if code != 173]
    letters += [chr(256 + n) for n in range(68)]
    tokens = letters + [f"{letter}</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return CLIPTokenizer.from_pretrained(folder)


def text_config(width: int, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=520,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=projection,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


def random_vae(**options) -> AutoencoderKL:
    """SDXL's kind of VAE with its factor 8, small, with random weights."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
        force_upcast=False,
        **options,
    )


def _pipeline(tokenizer: CLIPTokenizer) -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        cross_attention_dim=32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        norm_num_groups=8,
    )
    return StableDiffusionXLPipeline(
        vae=random_vae(),
        text_encoder=CLIPTextModel(text_config(16, 16)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(16, 16)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        add_watermarker=False,
    )


def _clip(width: int) -> CLIPModel:
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
        projection_dim=16,
    )
    text = text_config(width, 16)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))
