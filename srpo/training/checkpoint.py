"""Checkpoints of a training: weights, optimizer, moving average and the curve so far, one file per state.

A file carries a checksum of its tensors and its curve; one that is damaged is skipped with a warning.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from srpo.storage.checksummed import load_with_checksum, read_metadata, save_with_checksum

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

log = logging.getLogger(__name__)

NUM_KEPT = 2
Row = dict[str, float]


@dataclass(frozen=True)
class TrainingState:
    """Everything that a training step changes.

    Attributes:
        parameters: the trained ones, by name.
        ema: their moving average, in the same order; None without.
    """

    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: EMAModel | None

    def save(self, folder: Path, history: list[Row]) -> None:
        """Save the state after `len(history)` steps, and remove all older ones but the last."""
        path = folder / f"state-{len(history):06d}.safetensors"
        tensors = {name: value.detach().cpu().contiguous() for name, value in self._tensors().items()}
        tensors |= {name: value.clone() for name, value in tensors.items() if "qmap" in name}  # all share one
        numbers = json.dumps(self._numbers())
        save_with_checksum(tensors, path, {"history": json.dumps(history), "optimizer": numbers})
        for old in _states(folder)[NUM_KEPT:]:
            old.unlink()

    def load(self, folder: Path) -> list[Row]:
        """Restore the newest sound state of the folder; return the curve up to it, or [] if there is none."""
        for path in _states(folder):
            try:
                tensors = load_with_checksum(path)
                metadata = read_metadata(path)
                history = json.loads(metadata["history"])
                self._restore(tensors, json.loads(metadata["optimizer"]), len(history))
                return history
            except (OSError, ValueError, KeyError, TypeError) as error:  # a JSON error is a ValueError
                log.warning("%s: damaged (%.80s); trying the state before it", path, error)
        return []

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {f"weight/{name}": value for name, value in self.parameters.items()}
        for name, value in zip(self.parameters, self.ema.shadow_params if self.ema else [], strict=False):
            tensors[f"ema/{name}"] = value
        for number, state in self._optimizer_states():
            tensors |= {f"optimizer/{number}/{name}": value for name, value in state.items() if torch.is_tensor(value)}
        return tensors

    def _numbers(self) -> dict[str, Any]:
        """Return what the optimizer keeps besides tensors: numbers of parameters, and of groups of parameters."""
        return {
            "state": {str(number): _numbers_of(state) for number, state in self._optimizer_states()},
            "groups": [_numbers_of(group) for group in self.optimizer.param_groups],
        }

    def _optimizer_states(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the optimizer's state of each parameter; bitsandbytes' state_dict has it in a form of its own."""
        for number, parameter in enumerate(self.parameters.values()):
            yield number, self.optimizer.state.get(parameter, {})

    def _restore(self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any], steps: int) -> None:
        moments: dict[int, dict[str, Any]] = {int(number): values for number, values in numbers["state"].items()}
        for key in [key for key in tensors if key.startswith("optimizer/")]:
            _, number, name = key.split("/")
            moments.setdefault(int(number), {})[name] = tensors[key]
        own = self.optimizer.state_dict()["param_groups"]
        groups = [group | saved for group, saved in zip(own, numbers["groups"], strict=True)]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        with torch.no_grad():
            for i, (name, parameter) in enumerate(self.parameters.items()):
                parameter.copy_(tensors[f"weight/{name}"])
                if self.ema:
                    self.ema.shadow_params[i].copy_(tensors[f"ema/{name}"])
        if self.ema:
            self.ema.optimization_step = steps


def _numbers_of(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def _states(folder: Path) -> list[Path]:
    """Return the states in the folder, newest first."""
    return sorted(folder.glob("state-*.safetensors"), reverse=True)
