"""The three losses: against their formulas, written out again, and by what they do to a model."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from srpo.config.schema import TrainParams
from srpo.training.losses import Loss, dpo, make_loss, nft, pair_metrics, sft

N, SHAPE = 3, (4, 2, 2)


def settings(**values) -> TrainParams:
    return TrainParams(rank=1, steps=1, batch_size=N, learning_rate=1e-3, **values)


def drawn(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = (torch.randn(count, *SHAPE, generator=generator) for _ in range(3))
    return *tensors, torch.rand(N, generator=generator)


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(((one - other) ** 2).sum()) / one.numel()


def test_sft_is_the_weighted_error_of_each_winner() -> None:
    predicted, _, target, weight = drawn(N)
    expected = [float(weight[i]) * error(predicted[i], target[i]) for i in range(N)]
    assert sft(predicted, None, target, weight).tolist() == pytest.approx(expected, rel=1e-5)


def test_dpo_is_the_formula_of_the_paper() -> None:
    predicted, reference, target, weight = drawn(2 * N)
    expected = []
    for i in range(N):
        winner, loser = (error(predicted[j], target[j]) - error(reference[j], target[j]) for j in (i, i + N))
        margin = torch.tensor(-0.5 * 3.0 * float(weight[i]) * (winner - loser), dtype=torch.float64)
        expected.append(-float(torch.log(1 / (1 + torch.exp(-margin)))))
    assert dpo(predicted, reference, target, weight, beta=3.0).tolist() == pytest.approx(expected, rel=1e-4)
    at_start = dpo(reference, reference, target, weight, beta=3.0)
    assert torch.allclose(at_start, torch.full((N,), 2.0).log()), "the reference itself must lose log 2"


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_nft_is_the_formula_of_the_paper(beta: float) -> None:
    predicted, reference, target, weight = drawn(2 * N)
    expected = []
    for i in range(N):
        positive = reference[i] + beta * (predicted[i] - reference[i])
        negative = reference[i + N] - beta * (predicted[i + N] - reference[i + N])
        total = error(positive, target[i]) + error(negative, target[i + N])
        expected.append(0.5 * float(weight[i]) * total)
    assert nft(predicted, reference, target, weight, beta=beta).tolist() == pytest.approx(expected, rel=1e-4)


def test_params_choose_the_loss_and_its_beta() -> None:
    predicted, reference, target, weight = drawn(2 * N)
    for values, function in (
        ({"objective": "dpo", "dpo_beta": 7.0}, lambda *given: dpo(*given, beta=7.0)),
        ({"objective": "nft", "nft_beta": 0.5}, lambda *given: nft(*given, beta=0.5)),
    ):
        made = make_loss(settings(**values))
        given = predicted, reference, target, weight
        assert made.pairs and torch.equal(made.function(*given), function(*given))
    assert make_loss(settings()) == Loss(False, sft)


@pytest.mark.parametrize("name", ["sft", "dpo", "nft"])
def test_a_few_steps_prefer_winners_to_losers(name: str) -> None:
    """A linear denoiser: its error falls for winners, against what it does for losers."""
    generator = torch.Generator().manual_seed(1)
    winners, losers = (torch.randn(8, 16, generator=generator) + shift for shift in (1.0, -1.0))
    clean, schedule = torch.cat([winners, losers]).view(16, *SHAPE), DDPMScheduler()
    model, reference = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)

    def errors() -> torch.Tensor:
        noise = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(2)).repeat(2, 1, 1, 1)
        noisy = schedule.add_noise(clean, noise, torch.full((16,), 300)).flatten(1)
        return (model(noisy) - noise.flatten(1)).pow(2).mean(1).view(2, 8).mean(1)

    def fit(loss: Loss, rows: slice) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(60):
            noise = torch.randn(8, *SHAPE, generator=generator).repeat(2, 1, 1, 1)
            timesteps = torch.randint(100, 500, (8,), generator=generator).repeat(2)
            noisy = schedule.add_noise(clean, noise, timesteps)[rows].flatten(1)
            predicted, old = (network(noisy).view(-1, *SHAPE) for network in (model, reference))
            weight = torch.ones(len(predicted) // 2 if loss.pairs else len(predicted))
            loss.function(predicted, old.detach(), noise[rows], weight).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    fit(make_loss(settings()), slice(None))  # what rounds start from has learned winners and losers alike
    reference.load_state_dict(model.state_dict())
    before = errors()
    loss = make_loss(settings(objective=name, dpo_beta=20.0))
    fit(loss, slice(None) if loss.pairs else slice(8))
    after = errors()
    assert after[0] - after[1] < before[0] - before[1] - 0.01


def test_pair_metrics_are_errors_against_the_reference() -> None:
    predicted, reference, target, _ = drawn(2 * N)
    metrics = pair_metrics(predicted, reference, target)
    for i in range(N):
        winner, loser = error(predicted[i], target[i]), error(predicted[i + N], target[i + N])
        old_winner, old_loser = error(reference[i], target[i]), error(reference[i + N], target[i + N])
        distance = (error(predicted[i], reference[i]) + error(predicted[i + N], reference[i + N])) / 2
        expected = {
            "winner_error": winner,
            "reference_winner_error": old_winner,
            "loser_error": loser,
            "reference_loser_error": old_loser,
            "implicit_accuracy": float(winner - old_winner < loser - old_loser),
            "reference_distance": distance,
        }
        assert {name: value[i].item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-5)
