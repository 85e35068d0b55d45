"""LoRA on both text encoders: trained with the UNet's, and at work wherever the round's model is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from srpo.config.loader import Params, load_params
from srpo.config.schema import BaseLora, InitialLora, TrainParams
from srpo.errors import UserError
from srpo.lineage.record import WEIGHTS_FILE
from srpo.models.pipeline import TEXT_ENCODERS
from srpo.release.export import merged_pipeline, write_kohya
from srpo.rounds import Round, RoundFiles
from srpo.sampling.conditioning import PromptEmbeds
from srpo.sampling.sampler import Sampler
from srpo.sampling.text_encoding import encode_prompts
from srpo.stages.evaluate import evaluate
from srpo.stages.generate import generate
from srpo.stages.train import train
from srpo.storage.hashing import file_digest
from srpo.training.denoiser import Denoiser
from srpo.training.model import TextEncoders, make_trainable
from srpo.training.prompt_tokens import PromptTokens
from tests.stages.test_gentle_lora import latents
from tests.training.helpers import contents, losses, with_runtime, with_train
from tests.training.test_resume import interrupted
from tests.training.test_train import predict

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture
def text(params: Params) -> Params:
    """Params that train both text encoders, fast enough to be seen."""
    return with_train(params, train_text_encoder=True, learning_rate=1e-2, caption_dropout=0.4)


def trained(params: Params, root: Path, key: str = "001") -> RoundFiles:
    train(Round.of(params, root, key))
    return RoundFiles(root, key)


def close(found: PromptEmbeds, expected: PromptEmbeds, atol: float = 1e-4) -> bool:
    pairs = [(found.tokens, expected.tokens), (found.pooled, expected.pooled)]
    return all(torch.allclose(one, other, atol=atol) for one, other in pairs)


def encoded_by(pipeline: StableDiffusionXLPipeline) -> PromptEmbeds:
    return encode_prompts(pipeline, PROMPTS, chunked=False, padded=True)


@pytest.mark.parametrize(
    "values", [{}, pytest.param({"objective": "nft", "use_dora": True}, marks=pytest.mark.slow)], ids=["sft", "nft"]
)
def test_both_rounds_are_sampled_with_their_encoders(text: Params, root: Path, values: dict) -> None:
    wanted = with_train(text, **values)
    adapters = [trained(wanted, root, key).adapter for key in ("001", "002")]
    base, first, second = (Sampler(text, adapter).encode(PROMPTS) for adapter in (None, *adapters))
    assert not close(first, base, 1e-3) and not close(second, first, 1e-3)
    assert not first.tokens[-1].any(), "the empty prompt's conditioning stays zero"


def test_every_export_gives_the_same_conditioning(text: Params, root: Path) -> None:
    adapter = trained(text, root).adapter
    expected = Sampler(text, adapter).encode(PROMPTS)
    assert close(encoded_by(merged_pipeline(text, adapter)), expected)

    pipeline = StableDiffusionXLPipeline.from_pretrained(root / "data" / "base")
    pipeline.load_lora_weights(adapter, weight_name=WEIGHTS_FILE)
    assert close(encoded_by(pipeline), expected), "plain diffusers reads it the same"

    write_kohya(adapter, root / "data" / "kohya.safetensors")
    for file in (root / "data" / "kohya.safetensors", adapter / WEIGHTS_FILE):
        model = text.model.model_copy(update={"loras": [BaseLora(path=str(file))]})
        with_lora = Sampler(text.model_copy(update={"model": model}))
        assert close(with_lora.encode(PROMPTS), expected)
        assert torch.allclose(predict(with_lora.unet), predict(Sampler(text, adapter).unet), atol=1e-4)

    lora = InitialLora(path="data/kohya.safetensors", sha256=file_digest(root / "data" / "kohya.safetensors"))
    train(Round.of(with_train(text, initial_lora=lora, learning_rate=1e-9), root, "001"))
    assert close(Sampler(text, adapter).encode(PROMPTS), expected, 1e-3), "a round starts from the file"


def test_generate_and_evaluate_use_the_encoders(text: Params, root: Path) -> None:
    files = trained(text, root)
    state = load_file(files.adapter / WEIGHTS_FILE)
    (files.adapter / "lineage.json").unlink()

    def drifts(size: float) -> tuple[float, float]:
        """Return how far candidates and evaluation move if only the text encoders are changed, that much."""
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, value in state.items():
            network, _, layer = name.partition(".")
            factor = 0.0 if network == "unet" and ".up." in layer else size
            parts.setdefault(network, {})[layer] = value * factor
        StableDiffusionXLPipeline.save_lora_weights(
            files.adapter, **{f"{network}_lora_layers": part for network, part in parts.items()}
        )
        generate(Round.of(text, root, "002"))
        evaluate(Round.of(text, root, "001"))
        moved = latents(root, "002")
        return float(moved.sum()), json.loads((files.evaluation / "drift.json").read_text())["drift"]

    (files.adapter / "lineage.json").write_text("{}")
    evaluate(Round.of(text, root, "base"))
    still, moved = drifts(0.0), drifts(3.0)
    assert still[1] == pytest.approx(0.0, abs=1e-6) and moved[1] > 1e-5
    assert still[0] != moved[0]
    assert drifts(0.0) == still, "the cache of embeddings does not mix up adapters"


def test_the_reference_has_encoders_of_its_own(text: Params, root: Path) -> None:
    expected = Sampler(text, trained(text, root).adapter).encode(PROMPTS)
    sampler = Sampler(text)
    pipeline = sampler.text_pipeline
    encoders = TextEncoders(pipeline.text_encoder, pipeline.text_encoder_2)
    round = Round.of(text, root, "002")
    model = make_trainable(sampler.unet, round, with_reference=True, dtype=torch.float32, encoders=encoders)
    assert close(encoded_by(pipeline), expected), "training goes on from what is sampled"
    with torch.no_grad():
        for value in model.parameters.values():
            value.add_(0.1)
    assert not close(encoded_by(pipeline), expected, 1e-3)
    with model.reference():
        assert close(encoded_by(pipeline), expected)


@pytest.mark.slow
def test_resuming_gives_the_same_bytes(text: Params, root: Path) -> None:
    wanted = with_runtime(with_train(text, steps=5, lora_dropout=0.3, ema_decay=0.9), checkpoint_every=2)
    undisturbed = contents(trained(wanted, root))
    interrupted(wanted, root, 4)
    assert contents(trained(wanted, root)) == undisturbed


@pytest.mark.slow
def test_passes_and_checkpoints_change_no_loss(text: Params, root: Path) -> None:
    model = text.model.model_copy(update={"long_prompts": "chunk"})
    wanted = with_train(text.model_copy(update={"model": model}), objective="dpo", lora_dropout=0.3, steps=4)
    whole = losses(trained(wanted, root))
    split = with_runtime(wanted, train_batch_size=1, gradient_checkpointing=True)
    assert losses(trained(split, root)) == pytest.approx(whole, rel=1e-4)


def test_tokens_give_the_samplers_conditioning(text: Params) -> None:
    """Long prompts in chunks, too."""
    model = text.model.model_copy(update={"long_prompts": "chunk"})
    sampler = Sampler(text.model_copy(update={"model": model}))
    prompts = ["a red circle", "a blue square of many colors, and more"]
    embeds = sampler.encode(prompts)
    pipeline = sampler.text_pipeline
    tokens = PromptTokens(pipeline, prompts, chunked=True)
    assert [tokens.num_chunks(row) for row in range(3)] == [embeds.num_chunks(row) for row in range(3)] != [1, 1, 1]
    encoders = TextEncoders(*(getattr(pipeline, name) for name in TEXT_ENCODERS))
    denoiser = Denoiser(sampler.unet, *encoders)
    for rows in ([0, 2], [1, 1]):
        with torch.no_grad():
            found = denoiser._encode(tokens[rows])
        assert torch.allclose(found.tokens, embeds[rows].tokens, atol=1e-5)
        assert torch.allclose(found.pooled, embeds[rows].pooled, atol=1e-5)


def test_a_parent_without_them_is_refused(text: Params, params: Params, root: Path) -> None:
    for wanted, parent in ((text, params), (params, text)):
        train(Round.of(parent, root, "001"))
        with pytest.raises(UserError, match="train_text_encoder differ from those of parent 001"):
            train(Round.of(wanted, root, "002"))


def test_whole_unets_have_no_lora_of_encoders(root: Path) -> None:
    values = load_params().train.model_dump() | {"method": "full", "train_text_encoder": True}
    with pytest.raises(ValueError, match="train_text_encoder: method is full"):
        TrainParams.model_validate(values)
