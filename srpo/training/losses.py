"""Training losses: `sft` (winners only), `dpo` (winner against loser) and `nft` (winner and negated loser).

A loss maps predictions to one number per winner. Every prediction is the UNet's output for a noised latent, in the
parametrization of `noise_schedule`; `error` below is the mean over a latent's elements of (prediction - target)^2. The
weights of winners (`select.weighting`) multiply the losses outside.

docs/methods.md has the formulas side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from srpo.config.schema import TrainParams


@dataclass(frozen=True)
class Loss:
    """A loss function and what it needs.

    Attributes:
        pairs: predictions come for winners and losers, [2n, ...] with the losers last; else [n, ...].
        function: (predicted, reference, target, weight) to float32 [n]. `reference` is the prediction of the model
            that training started from, for the same noised latents, None without pairs; `weight` [n] is
            `NoiseSchedule.weight`'s.
    """

    pairs: bool
    function: Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]


def make_loss(settings: TrainParams) -> Loss:
    """Return the loss that `train.objective` names, with its own settings filled in."""
    if settings.objective == "dpo":
        return Loss(True, lambda *inputs: dpo(*inputs, beta=settings.dpo_beta))
    if settings.objective == "nft":
        return Loss(True, lambda *inputs: nft(*inputs, beta=settings.nft_beta))
    return Loss(False, sft)


def sft(predicted: Tensor, reference: Tensor | None, target: Tensor, weight: Tensor) -> Tensor:
    """Return weight * error: supervised fine-tuning on the winners, the loss of DDPM (Ho et al., 2020, eq. 14)."""
    return _error(predicted, target) * weight


def dpo(predicted: Tensor, reference: Tensor, target: Tensor, weight: Tensor, *, beta: float) -> Tensor:
    """Return the loss of Diffusion-DPO (Wallace et al., 2023, arXiv:2311.12908, eq. 14).

    The winner's error should fall by more than the loser's, each against the reference's error for the same noise and
    timestep:

        -log sigmoid(-beta / 2 * weight * ((e_w - e_w_ref) - (e_l - e_l_ref)))

    `beta` stands for the paper's beta * T, and errors are means over elements, as in the authors' code (which uses
    beta 2000 for SD 1.5 and 5000 for SDXL). `weight` is the paper's omega, which they leave at 1.
    """
    winner, loser = (_error(predicted, target) - _error(reference, target)).chunk(2)
    return -F.logsigmoid(-beta / 2 * weight * (winner - loser))


def nft(predicted: Tensor, reference: Tensor, target: Tensor, weight: Tensor, *, beta: float) -> Tensor:
    """Return the loss of DiffusionNFT (Zheng et al., 2025, arXiv:2509.16117), with r = 1 for winners and 0 for losers.

        v+ = (1 - beta) * v_ref + beta * v      fits the winner,
        v- = (1 + beta) * v_ref - beta * v      fits the loser:   weight * (e(v+) + e(v-)) / 2

    so v moves from the reference toward winners and away from losers, and both terms are bounded below. Left out of
    the paper's code: its normalization of the error in x_0 by that error's size, and its KL term.
    """
    (winner, loser), (winner_ref, loser_ref), (winner_target, loser_target) = (
        tensor.chunk(2) for tensor in (predicted, reference, target)
    )
    positive = _error((1 - beta) * winner_ref + beta * winner, winner_target)
    negative = _error((1 + beta) * loser_ref - beta * loser, loser_target)
    return weight * (positive + negative) / 2


def pair_metrics(predicted: Tensor, reference: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Return what a loss on pairs hides, float32 [n] each, for predictions of winners and losers, [2n, ...].

    The errors of winners and losers and those of the reference for the same noise; `implicit_accuracy`, 1 where the
    winner's error fell by more than the loser's (the sign of DPO's margin); `reference_distance`, the mean squared
    difference of prediction and reference.
    """
    winner_error, loser_error = _error(predicted, target).chunk(2)
    reference_winner_error, reference_loser_error = _error(reference, target).chunk(2)
    is_better = (winner_error - reference_winner_error) < (loser_error - reference_loser_error)
    return {
        "winner_error": winner_error,
        "reference_winner_error": reference_winner_error,
        "loser_error": loser_error,
        "reference_loser_error": reference_loser_error,
        "implicit_accuracy": is_better.float(),
        "reference_distance": _error(predicted, reference).view(2, -1).mean(0),
    }


def _error(predicted: Tensor, target: Tensor) -> Tensor:
    return (predicted - target).pow(2).mean(dim=(1, 2, 3))
