"""`srpo fit-reward`: taste is learned from picks and votes, predicts held-out ones, and chance is refused.

python -m pytest tests/review/test_fit_reward.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
import torch

from srpo.cli import run
from srpo.config.loader import load_params
from srpo.config.schema import RewardParams
from srpo.data import parquet
from srpo.data.images import decode_image, encode_image
from srpo.data.schemas import CANDIDATE_FIELDS
from srpo.review.fit_reward import Comparisons, fit, held_out_agreement
from srpo.review.state import Review
from srpo.rewards.batches import to_tensor
from srpo.rewards.loading import load_reward
from srpo.rounds import BASE, Round
from tests.support.world import SIZE

COUNT, CANDIDATES, FEATURES = 40, 4, 6


def comparisons(strength: float, prompts: int = 60) -> tuple[Comparisons, torch.Tensor]:
    """Comparisons by people who follow fixed weights, more reliably the greater `strength` is."""
    rng = np.random.default_rng(0)
    truth = torch.tensor(rng.normal(size=FEATURES))
    differences = torch.tensor(rng.normal(size=(prompts * 3, FEATURES)))
    flip = torch.tensor(rng.random(len(differences))) > torch.sigmoid(strength * differences @ truth)
    differences[flip] *= -1
    names = np.array([f"prompt {i // 3}" for i in range(len(differences))])
    weights = torch.full((len(differences),), 1 / 3, dtype=torch.float64)
    return Comparisons(differences, weights, np.arange(len(differences)) // 3, names), truth


def test_taste_is_found_and_noise_is_not() -> None:
    clear, truth = comparisons(5.0)
    weight = fit(clear, 0.01)
    assert torch.nn.functional.cosine_similarity(weight, truth, dim=0) > 0.98
    agreement = held_out_agreement(clear, seed=0)
    assert 0.8 < agreement.low < agreement.value < agreement.high <= 1
    noise = held_out_agreement(comparisons(0.0)[0], seed=0)
    assert noise.low < 0.5 < noise.high


def test_the_fit_is_the_minimum() -> None:
    from scipy.optimize import minimize

    noisy, _ = comparisons(0.5)
    differences, weights = noisy.differences.numpy(), noisy.weights.numpy()

    def loss(w: np.ndarray) -> float:
        return float((np.logaddexp(0, -differences @ w) * weights).sum() / weights.sum() + 0.05 * (w**2).sum())

    assert fit(noisy, 0.1).numpy() == pytest.approx(minimize(loss, np.zeros(FEATURES)).x, abs=1e-4)


@pytest.fixture
def project(world: Path) -> Round:
    """Round 001 of 40 prompts with 4 candidates each, of different brightness and, by prompt, of two sizes."""
    round = Round.of(load_params(), world, "001")
    rng, rows = np.random.default_rng(0), []
    for i in range(COUNT):
        for index in range(CANDIDATES):
            pixels = np.clip(rng.normal(40 + 170 * rng.random(), 12, (SIZE, SIZE * (1 + i % 2), 3)), 0, 255).astype(
                np.uint8
            )
            identity = {"candidate_id": f"001-p{i}-{index}", "prompt_id": f"p{i}", "prompt": f"a red circle, {i}"}
            rows.append(dict.fromkeys(CANDIDATE_FIELDS) | identity | {"index": index, "image": encode_image(pixels)})
    parquet.write_table(round.files.candidates / "shard-00000.parquet", rows, CANDIDATE_FIELDS)
    return round


def pick_all(round: Round, choose: Callable[[np.ndarray], int]) -> None:
    """Pick one candidate of each prompt by the brightness of its images."""
    review = Review(round, BASE)
    for item, group in review.prompts.items():
        images = [decode_image({"bytes": review.images.bytes_at(place)}) for place in group["place"]]
        picked = group["candidate_id"][choose(np.array([np.asarray(image).mean() for image in images]))]
        data = {"id": uuid4().hex, "rater": "anna", "item": item, "picked": picked, "seconds": 1.0}
        review.save_pick(data | {"scores_shown": False})


def test_a_reward_learns_what_people_pick(project: Round, capsys: pytest.CaptureFixture[str]) -> None:
    pick_all(project, lambda brightness: int(brightness.argmax()))
    assert run(["fit-reward", "001", "--clip", "data/reward"]) == 0
    printed = capsys.readouterr().out
    assert "40 decisions about 40 prompts; agreement on held-out prompts" in printed
    assert "people: {kind: head, model: data/fitted-reward, role: select}" in printed
    folder = project.root / "data/fitted-reward"
    record = json.loads((folder / "head.json").read_text())
    assert record["held_out_agreement"]["low"] > 0.6 and record["rounds"] == ["001"]
    spec = RewardParams(kind="head", model="data/fitted-reward", role="select")
    reward = load_reward(spec, project.root, torch.device("cpu"))
    rows = list(parquet.read_rows(project.files.candidates))
    images = [to_tensor([row["image"]]) for row in rows]
    scores = torch.cat([reward.score(one, [row["prompt"]]) for one, row in zip(images, rows, strict=True)])
    brightness = torch.stack([one.float().mean() for one in images]).reshape(COUNT, CANDIDATES)
    scores = scores.reshape(COUNT, CANDIDATES)
    assert (scores.argmax(dim=1) == brightness.argmax(dim=1)).float().mean() > 0.7
    first = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert run(["fit-reward", "001", "--clip", "data/reward"]) == 0  # replaces its own folder, by the same bytes
    assert {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()} == first


def test_chance_is_refused(project: Round, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    pick_all(project, lambda brightness: int(rng.integers(len(brightness))))
    assert run(["fit-reward", "001", "--clip", "data/reward"]) == 2
    message = capsys.readouterr().err
    assert "which is not above chance, 0.5; nothing is written" in message and message.count("\n") == 1
    assert not (project.root / "data/fitted-reward").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["001"], "decisions about 0 prompts of 001; at least 20 are needed"),
        (["001", "--to", "data"], "data: exists, and fit-reward did not write it; name another folder"),
        (["009"], "rounds.009: no such round"),
    ],
)
def test_bad_input_is_one_line(project: Round, capsys, arguments: list[str], words: str) -> None:
    assert run(["fit-reward", *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_votes_are_preferences(campaign: Path, open_review: Callable) -> None:
    from srpo.review.preferences import preferences
    from tests.review.test_votes import round_of, vote_all

    vote_all(campaign, open_review)
    round = round_of(campaign)
    found = list(preferences([round]))
    assert len(found) == 19  # one of the twenty votes is equal
    own = [one.chosen[0].parent.parent.name == "001" for one in found]
    assert sum(own) == 17 and all(one.chosen[1] == one.others[0][1] for one in found)
