"""CLIP's text side at toy size: a byte-pair tokenizer that knows the world's words, and text model configs."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTokenizer

LENGTH = 16
START, END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """Train CLIP's kind of tokenizer on `captions`: each of their words one token, any other text bytes.

    Args:
        captions: texts.
        folder: where vocab.json, merges.txt and tokenizer_config.json go, as CLIPTokenizer reads them.
    """
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # each byte once on its own, so that it is known at the end of a word too
    trainer = trainers.BpeTrainer(
        initial_alphabet=letters, end_of_word_suffix="</w>", vocab_size=2000, show_progress=False
    )
    learner.train_from_iterator([*captions, *letters], trainer)
    trained = json.loads(learner.to_str())["model"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [token for token in sorted(trained["vocab"], key=trained["vocab"].get) if token not in set(tokens)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate([*tokens, START, END])}))
    merges = "\n".join(" ".join(pair) for pair in trained["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return CLIPTokenizer.from_pretrained(folder)


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int, projection: int) -> CLIPTextConfig:
    """A text model of this size for this tokenizer."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        max_position_embeddings=LENGTH,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]):
    """int64 [n, 16]."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
