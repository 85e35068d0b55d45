"""Every family reads its published file format and computes its published formula."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor

from srpo.config.reward_families import FAMILIES
from srpo.errors import UserError
from srpo.rewards.aesthetic import AestheticReward
from srpo.rewards.clip import ClipReward
from srpo.rewards.hps import HpsV2, HpsV21
from srpo.rewards.imagereward import ImageReward
from srpo.rewards.pickscore import PickScore
from tests.rewards import formulas
from tests.rewards.checkpoints import SIDE, aesthetic_folder, clip_folder, hps_folder, imagereward_folder
from tests.support.world import LENGTH

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "a blue square", "a red circle", "very very " * 30]


def make_images(height: int = SIDE, width: int = SIDE) -> list[np.ndarray]:
    """Four soft random images: noise would make every resize look the same."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(0, 255, (4, 3, 5, 6))).float()
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255)
    return list(smooth.round().byte().permute(0, 2, 3, 1).numpy())


def tensor(pixels: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def transformers_cosine(folder: Path, prepared: torch.Tensor) -> tuple[torch.Tensor, CLIPModel]:
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    with torch.no_grad():
        found = model(pixel_values=prepared, **tokens)
    return (found.image_embeds * found.text_embeds).sum(dim=-1), model


def test_clip_score(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clip")
    cosine, _ = transformers_cosine(folder, formulas.normalized(make_images()))
    found = ClipReward(str(folder), None, CPU).score(tensor(make_images()), PROMPTS)
    assert found.dtype == torch.float32
    assert torch.allclose(found, 100 * cosine, atol=1e-4)
    assert found.std() > 0.5, "the scores say nothing"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_resize": False, "do_center_crop": False},
        {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False},
        {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 0.5], "size": {"shortest_edge": SIDE + 9}},
        {"resample": 2},
        {"do_normalize": False},
    ],
    ids=str,
)
def test_clip_preprocessing(tmp_path: Path, settings: dict) -> None:
    folder = clip_folder(tmp_path / "clip", **settings)
    images = tensor(make_images(SIDE, SIDE) if settings.get("do_resize") is False else make_images(50, 75))
    theirs = CLIPProcessor.from_pretrained(folder).image_processor(images, return_tensors="pt")["pixel_values"]
    reward = ClipReward(str(folder), None, CPU)
    off = (reward.encoder.preprocess(images, CPU) - theirs).abs()
    levels = 1 if settings.get("do_normalize") is False else 1 / 0.25
    assert off.max() <= 1.01 * levels / 255 and (off > 1e-5).float().mean() < 0.01


def test_prompts_are_embedded_once(tmp_path: Path) -> None:
    reward, seen = ClipReward(str(clip_folder(tmp_path / "clip")), None, CPU), []
    real = reward.encoder.tokenizer
    reward.encoder.tokenizer = lambda texts, **options: seen.extend(texts) or real(texts, **options)
    for _ in range(2):
        reward.score(tensor(make_images()), PROMPTS)
    assert sorted(seen) == sorted(set(PROMPTS))


def test_pickscore(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "pickscore")
    wide = make_images(40, 61)
    cosine, model = transformers_cosine(
        folder, formulas.normalized([formulas.shortest_and_crop(one, SIDE) for one in wide])
    )
    reward = PickScore(str(folder), None, CPU)
    assert torch.allclose(reward.score(tensor(wide), PROMPTS), model.logit_scale.exp() * cosine, atol=0.05)
    assert torch.allclose(
        reward.score(tensor(make_images()), PROMPTS),
        model.logit_scale.exp() * transformers_cosine(folder, formulas.normalized(make_images()))[0],
        atol=1e-5,
    )


@pytest.mark.parametrize("family", [HpsV2, HpsV21])
def test_hps(tmp_path: Path, family: type[HpsV2]) -> None:
    folder = hps_folder(tmp_path / "hps", family.FAMILY.file)
    state = torch.load(folder / family.FAMILY.file, weights_only=True)["state_dict"]
    ids = AutoTokenizer.from_pretrained(folder)(
        PROMPTS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    ).input_ids
    for model in (folder, folder / family.FAMILY.file):
        reward = family(str(model), None, CPU)
        for pixels, tolerance in ((make_images(), 1e-5), (make_images(40, 61), 2e-3)):
            prepared = formulas.normalized([formulas.longest_and_pad(one, SIDE) for one in pixels])
            expected = formulas.open_clip_cosine(state, prepared, ids)
            found = reward.score(tensor(pixels), PROMPTS)
            assert torch.allclose(found, expected, atol=tolerance), (found, expected)
            assert found.std() > 10 * tolerance
    assert reward.features(tensor(make_images())).shape == (4, 24)


def test_wrong_tensors_are_refused(tmp_path: Path) -> None:
    folder = hps_folder(tmp_path / "hps", HpsV2.FAMILY.file)
    state = torch.load(folder / HpsV2.FAMILY.file, weights_only=True)
    del state["state_dict"]["visual.proj"]
    torch.save(state, folder / HpsV2.FAMILY.file)
    with pytest.raises(UserError, match=r"visual_projection\.weight") as caught:
        HpsV2(str(folder), None, CPU)
    assert "\n" not in str(caught.value)


def test_pickled_code_is_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    (tmp_path / "hps").mkdir()
    torch.save({"state_dict": Trap()}, tmp_path / "hps" / HpsV2.FAMILY.file)
    with pytest.raises(UserError, match="can't load"):
        HpsV2(str(tmp_path / "hps"), None, CPU)
    assert not (tmp_path / "ran").exists()


def test_aesthetic(tmp_path: Path) -> None:
    folder = aesthetic_folder(tmp_path / "aesthetic")
    state = torch.load(folder / "sac+logos+ava1-l14-linearMSE.pth", weights_only=True)
    with torch.no_grad():
        found = CLIPModel.from_pretrained(folder).eval().get_image_features(formulas.normalized(make_images()))
    embeds = getattr(found, "pooler_output", found)
    expected = formulas.mlp(embeds / embeds.norm(dim=-1, keepdim=True), state)
    reward = AestheticReward(str(folder), None, CPU)
    assert torch.allclose(reward.score(tensor(make_images()), PROMPTS), expected, atol=1e-5)
    assert torch.equal(reward.score(tensor(make_images()), PROMPTS), reward.score(tensor(make_images()), [""] * 4))
    torch.save({name: value for name, value in state.items() if "7" not in name}, tmp_path / "short.pth")
    with pytest.raises(UserError, match=r"layers\.7\.weight"):
        AestheticReward(str(tmp_path / "short.pth"), None, CPU)


def test_imagereward(tmp_path: Path) -> None:
    folder = imagereward_folder(tmp_path / "imagereward")
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    tokens = AutoTokenizer.from_pretrained(folder)(
        PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    assert tokens.attention_mask.sum(dim=1).tolist() == [5, 5, 5, 35]
    reward = ImageReward(str(folder), None, CPU)
    for pixels, tolerance in ((make_images(), 1e-5), (make_images(40, 61), 5e-2)):
        prepared = formulas.normalized([formulas.shortest_and_crop(one, SIDE, round) for one in pixels])
        expected = formulas.image_reward(state, prepared, tokens.input_ids, tokens.attention_mask)
        found = reward.score(tensor(pixels), PROMPTS)
        assert torch.allclose(found, expected, atol=tolerance), (found, expected)
        assert found.std() > 0.1


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if FAMILIES[kind].model])
def test_offline_and_not_cached(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as hub

    from srpo.config.schema import RewardParams
    from srpo.rewards.loading import load_reward

    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    spec = RewardParams(kind=kind, role="judge")
    assert spec.model == FAMILIES[kind].model
    with pytest.raises(UserError, match=r"the Hub can't be reached; run once online, or give a local path") as caught:
        load_reward(spec, tmp_path, CPU)
    assert spec.model in str(caught.value) and "\n" not in str(caught.value)


def test_half_precision(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "pickscore")
    full = PickScore(str(folder), None, CPU).score(tensor(make_images()), PROMPTS)
    half = PickScore(str(folder), None, CPU, torch.float16).score(tensor(make_images()), PROMPTS)
    assert half.dtype == torch.float32
    assert torch.allclose(full, half, atol=0.05) and not torch.equal(full, half)
