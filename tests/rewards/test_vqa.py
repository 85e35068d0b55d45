"""VQAScore reads a checkpoint in transformers' layout and returns the probability of Yes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from srpo.config.schema import RewardParams
from srpo.errors import UserError
from srpo.rewards.loading import load_reward
from tests.rewards import formulas
from tests.rewards.checkpoints import PATCH, SIDE, clip_folder, llava_folder
from tests.rewards.test_families import make_images, tensor

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "a blue circle", "a red circle", "a circle"]


def load(folder: Path):
    return load_reward(RewardParams(kind="vqascore", model=str(folder), role="judge"), folder, CPU)


def test_vqascore_is_the_probability_of_yes(tmp_path: Path) -> None:
    folder = llava_folder(tmp_path / "llava")
    model, tokenizer = (
        LlavaForConditionalGeneration.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    pixels, expected = formulas.normalized(make_images()), []
    for prompt, image in zip(PROMPTS, pixels, strict=True):
        tokens = "<image> " * (SIDE // PATCH) ** 2
        asked = f'USER : {tokens}Does this figure show "{prompt}" ? Please answer yes or no . ASSISTANT :'
        ids = torch.tensor([[tokenizer.convert_tokens_to_ids(word) for word in asked.replace('"', ' " ').split()]])
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=image[None]).logits[0, -1]
        expected.append((logits.exp() / logits.exp().sum())[tokenizer.convert_tokens_to_ids("Yes")])
    found = load(folder).score(tensor(make_images()), PROMPTS)
    assert found.dtype == torch.float32 and ((found >= 0) & (found <= 1)).all()
    assert torch.allclose(found, torch.stack(expected), atol=1e-4)
    assert found.std() > 1e-4, "the scores say nothing"


def test_score_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    reward, images = load(llava_folder(tmp_path / "llava")), tensor(make_images())
    alone = torch.cat([reward.score(images[[i]], [PROMPTS[i]]) for i in range(4)])
    assert torch.equal(reward.score(images, PROMPTS), alone)


def test_no_chat_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't load"):
        load(clip_folder(tmp_path / "clip"))
    folder = llava_folder(tmp_path / "llava")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load(folder)
