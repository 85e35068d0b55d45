"""The tiny world: every caption can be read back, scenes are as said and else free, and the judge is exact."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from demo.captions import KINDS, PARTS, PLACES, RELATIONS, Caption, all_captions, alternatives, draw_scene, parse
from demo.describe import describe
from demo.judge import SceneJudge
from demo.make import DETAILED_PROMPTS, QUICK, choose_prompts, make_world
from demo.mistakes import CONFUSED, any_value, confused_value, miscaption
from demo.scenes import BACKGROUNDS, COLORS, SHAPES, SIZE, Scene, render
from demo.truth import ATTRIBUTES, Seen, matched, open_attributes, parts_right, read_image, true_of
from srpo.config.schema import RewardParams
from srpo.errors import UserError
from srpo.evaluation.diversity import open_diversity
from srpo.rewards.loading import load_reward
from tests.demo.made import assert_srpo_reads_the_models, assert_what_is_there_is_kept, make_quickly

REPO = Path(__file__).parents[2]
CAPTIONS = all_captions()
ALL = [caption for captions in CAPTIONS.values() for caption in captions]


@pytest.fixture(scope="module")
def quick_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_quickly(partial(make_world, effort=QUICK), tmp_path_factory.mktemp("quick") / "data")


def some(kind: str, number: int, seed: int = 0) -> list[Caption]:
    picks = np.random.default_rng(seed).integers(len(CAPTIONS[kind]), size=number)
    return [CAPTIONS[kind][i] for i in picks]


def seen(scene: Scene) -> Seen:
    return Seen(scene.background, scene.items)


def as_pixels(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def test_every_caption_is_parsed_back() -> None:
    texts = [caption.text for caption in ALL]
    assert [parse(text) for text in texts] == ALL and len(set(texts)) == len(texts) > 2000
    assert {"an orange shape on the left", "three crosses", "a red circle left of a blue square"} <= set(texts)
    assert [caption.kind for captions in CAPTIONS.values() for caption in captions] == [
        kind for kind, captions in CAPTIONS.items() for _ in captions
    ]


@pytest.mark.parametrize("text", ["", "a dog", "an red circle", "two circle", "a red circle on the left ", "A circle"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a caption of the tiny world"):
        parse(text)


@pytest.mark.parametrize("kind", KINDS)
def test_the_judge_reads_what_is_rendered(kind: str) -> None:
    """With noise, too; and a caption that says one part otherwise is not true of the image."""
    rng, judge = np.random.default_rng(1), SceneJudge(None, None, torch.device("cpu"))
    captions = some(kind, 60)
    scenes = [draw_scene(caption, rng) for caption in captions]
    images = [render(scene, rng) for scene in scenes]
    noisy = [np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype(np.uint8) for image in images]
    texts = [caption.text for caption in captions]
    assert judge.score(as_pixels(images), texts).tolist() == [1.0] * 60
    assert judge.score(as_pixels(noisy), texts).mean() >= 0.95
    for image, caption, scene in zip(images, captions, scenes, strict=True):
        # a shape on the left can be at the top as well
        for part in set(PARTS) - {"relation", "place"}:
            for other in alternatives(caption, part):
                assert matched(other, read_image(image)) is None, (other.text, scene)


def test_scenes_are_free_in_what_their_caption_leaves_open() -> None:
    rng = np.random.default_rng(2)
    shown = [open_attributes(parse("a red circle"), seen(draw_scene(parse("a red circle"), rng))) for _ in range(600)]
    columns = dict(zip(ATTRIBUTES, np.array(shown).T, strict=True))
    assert set(columns["color"]) == set(columns["shape"]) == {-1}, "the caption says them"
    for name in ("column", "row", "size", "background"):
        assert sorted(set(columns[name])) == [0, 1, 2] and min(Counter(columns[name]).values()) > 120
    said = np.array(
        [open_attributes(parse("a shape on the left"), seen(draw_scene(parse("a shape on the left"), rng)))]
    )
    assert said[0, ATTRIBUTES.index("column")] == -1 and said[0, ATTRIBUTES.index("row")] >= 0


def test_collapse_and_mistakes_are_told_apart() -> None:
    rng, caption = np.random.default_rng(3), parse("two squares")
    free = [open_attributes(caption, seen(draw_scene(caption, rng))) for _ in range(40)]
    wrong = [open_attributes(caption, seen(draw_scene(parse("three squares"), rng))) for _ in range(40)]
    assert np.array(wrong).max() == -1, "an image that is wrong has no attributes"
    varied, alone, collapsed = (
        open_diversity(np.array(rows), ["a"] * len(rows)) for rows in (free, free[:20] + wrong, free[:1] * 40)
    )
    assert varied and alone and collapsed
    assert varied.value > 0.6 and abs(varied.value - alone.value) < 0.1 and collapsed.value == 0


def test_the_colors_of_two_shapes_exchanged_are_wrong() -> None:
    caption = parse("a red circle left of a blue square")
    scene = draw_scene(parse("a blue circle left of a red square"), np.random.default_rng(4))
    assert matched(caption, seen(scene)) is None
    right = parts_right(caption, seen(scene))
    assert right == {"count": True, "color": True, "shape": True, "relation": False}


def test_an_image_of_nothing_is_wrong() -> None:
    for shade in BACKGROUNDS.values():
        image = np.full((SIZE, SIZE, 3), shade, dtype=np.uint8)
        assert matched(parse("a shape on the left"), read_image(image)) is None
    noise = np.random.default_rng(5).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
    assert matched(parse("a shape on the left"), read_image(noise)) is None


def test_many_at_once_are_judged_as_one() -> None:
    rng = np.random.default_rng(6)
    scenes = [draw_scene(ALL[i], rng) for i in rng.integers(len(ALL), size=30)]
    expected = [[matched(caption, seen(scene)) is not None for caption in ALL] for scene in scenes]
    assert true_of(ALL, scenes).tolist() == expected


def test_mistakes_are_scattered_or_always_the_same() -> None:
    rng, caption = np.random.default_rng(7), parse("a red circle on a black background")
    told = Counter(miscaption(caption, rng, 0.1, any_value).text for _ in range(3000))
    # a replacement may be the right value by chance
    right = (1 - 0.1 * 5 / 6) * (1 - 0.1 * 3 / 4) * (1 - 0.1 * 2 / 3)
    assert abs(told.pop(caption.text) / 3000 - right) < 0.03 and len(told) > 8
    assert parse(next(iter(told))).kind == "background"
    told = Counter(miscaption(caption, rng, 0.3, confused_value).text for _ in range(3000))
    assert abs(told[caption.text] / 3000 - 0.7**3) < 0.03 and len(told) == 2**3
    assert told["an orange square on a white background"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_caption_is_one_too(kind: str) -> None:
    rng = np.random.default_rng(10)
    for caption in some(kind, 100):
        for other in (any_value, confused_value):
            wrong = miscaption(caption, rng, 1.0, other)
            assert parse(wrong.text) == wrong


def test_confusions_stay_in_the_world() -> None:
    values = {*COLORS, *SHAPES, *PLACES, *BACKGROUNDS, *RELATIONS, 2, 3} - {"center"}
    assert set(CONFUSED) == values and set(CONFUSED.values()) <= values


@pytest.mark.parametrize("kind", KINDS)
def test_scenes_are_described_rightly(kind: str) -> None:
    """Every part is said of some scenes and left open in others."""
    rng = np.random.default_rng(8)
    scenes = [draw_scene(caption, rng) for caption in some(kind, 200)]
    described = [describe(scene, rng) for scene in scenes]
    assert all(matched(caption, seen(scene)) for caption, scene in zip(described, scenes, strict=True))
    assert all(parse(caption.text) == caption for caption in described)
    parts = {"background", "relation"} if kind in ("pair", "relation") else {"background"}
    parts |= {"place"} if kind in ("object", "place", "background") else set()
    for part in parts:
        assert 40 < sum(getattr(caption, part) is not None for caption in described) < 195


def test_every_caption_is_for_one_use() -> None:
    train, held_out, left = choose_prompts()
    assert (len(train), len(held_out)) == (600, 60)
    plain, detailed = train[:-DETAILED_PROMPTS], train[-DETAILED_PROMPTS:]
    assert sorted(caption.text for caption in ALL) == sorted(one.text for one in (*plain, *held_out, *left))
    for captions in (plain, held_out):
        assert {caption.kind for caption in captions} == set(KINDS)
    assert {caption.kind for caption in left} == set(KINDS) - {"object"}
    assert all(one.place and one.background and parse(one.text) == one for one in detailed)
    assert len(set(train)) == len(train)


def test_prompts_and_images_that_the_judge_cant_read_are_refused() -> None:
    spec = RewardParams(kind="demo.judge:SceneJudge", role="judge")
    judge = load_reward(spec, REPO, torch.device("cpu"))
    image = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    with pytest.raises(UserError, match="'a dog' is not a caption of the tiny world; this judge reads only its"):
        judge.score(image, ["a dog"])
    with pytest.raises(UserError, match="images of 32 x 64; this judge reads images of 64 x 64"):
        judge.attributes(image[..., :32], ["a circle"])


@pytest.mark.slow
def test_the_models_are_in_the_formats_that_srpo_reads(quick_world: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    assert_srpo_reads_the_models(quick_world, parameters=(2.5e6, 4e6), most_bytes=15e6)
    pipeline = StableDiffusionXLPipeline.from_pretrained(quick_world / "base")
    pipeline("a red circle", height=SIZE, width=SIZE, num_inference_steps=1)
    assert {"reward", "judge", "base", "prompts", "reference"} <= {path.name for path in quick_world.iterdir()}


def test_plain_diffusers_samples_with_an_adapter(tmp_path: Path) -> None:
    """Without a dtype: all parts must load in the same one. The preset's LoRA has convolutions."""
    from diffusers import StableDiffusionXLPipeline

    from srpo.config.loader import load_params
    from srpo.training.model import LoraModel

    pipeline = StableDiffusionXLPipeline.from_pretrained(REPO / "data" / "base")
    settings = load_params(REPO / "params.yaml").train
    trained = LoraModel(copy.deepcopy(pipeline.unet), settings, seed=0)
    for name, value in trained.parameters.items():
        if "lora_B" in name:  # it starts as zeros
            torch.nn.init.ones_(value)
    trained.save(tmp_path)

    def sample() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        images = pipeline("a red circle", height=SIZE, width=SIZE, num_inference_steps=2, generator=generator).images
        return np.asarray(images[0])

    plain = sample()
    pipeline.load_lora_weights(tmp_path)
    assert not np.array_equal(sample(), plain), "the adapter changes nothing"


@pytest.mark.slow
def test_what_is_there_is_kept(quick_world: Path) -> None:
    assert_what_is_there_is_kept(partial(make_world, effort=QUICK), quick_world)


@pytest.mark.slow
def test_the_base_is_right_in_about_half() -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(REPO / "data" / "base")
    pipeline.set_progress_bar_config(disable=True)
    texts = [caption.text for captions in choose_prompts()[:2] for caption in captions[:365]]  # of all kinds
    images = pipeline(
        texts, num_inference_steps=12, guidance_scale=3.0, height=SIZE, width=SIZE, output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    pixels = torch.from_numpy((images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)
    judge = SceneJudge(None, None, torch.device("cpu"))
    assert 0.4 < judge.score(pixels, texts).mean() < 0.6


@pytest.mark.slow
@pytest.mark.parametrize(("name", "blind_to"), [("reward", {"relation"}), ("judge", {"relation", "place"})])
def test_reward_and_judge_see_what_their_table_says(name: str, blind_to: set[str]) -> None:
    """Of an image that a caption is true of and one in which one part is otherwise, they prefer the first."""
    models, rng = REPO / "data", np.random.default_rng(9)
    clip = load_reward(RewardParams(kind="clip", model=str(models / name), role="judge"), REPO, torch.device("cpu"))
    for part in PARTS:
        told = [caption for caption in ALL if alternatives(caption, part)]
        captions = [told[i] for i in rng.integers(len(told), size=80)]
        others = []
        for caption in captions:
            values = alternatives(caption, part)
            other = values[int(rng.integers(len(values)))]
            scene = draw_scene(other, rng)
            while matched(caption, seen(scene)):  # on the left and at the top, say
                scene = draw_scene(other, rng)
            others.append(render(scene, rng))
        right = [render(draw_scene(caption, rng), rng) for caption in captions]
        texts = [caption.text for caption in captions]
        preferred = (clip.score(as_pixels(right), texts) > clip.score(as_pixels(others), texts)).float().mean()
        assert (preferred < 0.65) if part in blind_to else (preferred > 0.9), (part, preferred)
