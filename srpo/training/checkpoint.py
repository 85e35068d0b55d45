"""What a killed training goes on from: weights, optimizer, moving average and the curve so far, in two files a state.

`state-<step>.safetensors` holds the tensors and `state-<step>.json` the curve and the first one's sha256. The second
is written last, so a state without it is not there. A state that is damaged is as if it were not there, with a warning.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from srpo.storage.files import atomic_write
from srpo.storage.hashing import file_digest
from srpo.storage.json_files import write_json

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

log = logging.getLogger("srpo")
KEPT = 2
Row = dict[str, float]


@dataclass(frozen=True)
class TrainingState:
    """All that a training step changes.

    Attributes:
        parameters: the trained ones, by name.
        ema: their moving average, in the same order; None without.
    """

    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: EMAModel | None

    def save(self, folder: Path, history: list[Row]) -> None:
        """Keep the state after `len(history)` steps, and of older ones the last."""
        path = folder / f"state-{len(history):06d}.safetensors"
        tensors = {name: value.detach().cpu().contiguous() for name, value in self._tensors().items()}
        with atomic_write(path) as partial:
            save_file(tensors, partial)
        write_json(path.with_suffix(".json"), {"history": history, "tensors": file_digest(path)})
        for old in _states(folder)[KEPT:]:
            old.unlink()
            old.with_suffix(".safetensors").unlink(missing_ok=True)

    def load(self, folder: Path) -> list[Row]:
        """Take on the last sound state of the folder; the curve up to it, or [] where there is none."""
        for record in _states(folder):
            try:
                found = json.loads(record.read_text(encoding="utf-8"))
                path = record.with_suffix(".safetensors")
                if file_digest(path) != found["tensors"]:
                    raise ValueError("other bytes than were written")
                self._take(load_file(path))
                return found["history"]
            except (OSError, ValueError, KeyError, TypeError) as error:  # JSON's and Unicode's errors are ValueErrors
                log.warning("%s: damaged (%.80s); trying the state before it", record, error)
        return []

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {f"weight/{name}": value for name, value in self.parameters.items()}
        for name, value in zip(self.parameters, self.ema.shadow_params if self.ema else [], strict=False):
            tensors[f"ema/{name}"] = value
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{name}": value for name, value in state.items()}
        return tensors

    def _take(self, tensors: dict[str, torch.Tensor]) -> None:
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key in [key for key in tensors if key.startswith("optimizer/")]:
            _, number, name = key.split("/")
            moments.setdefault(int(number), {})[name] = tensors[key]
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        with torch.no_grad():
            for i, (name, parameter) in enumerate(self.parameters.items()):
                parameter.copy_(tensors[f"weight/{name}"])
                if self.ema:
                    self.ema.shadow_params[i].copy_(tensors[f"ema/{name}"])
        if self.ema:
            self.ema.optimization_step = int(moments[0]["step"])


def _states(folder: Path) -> list[Path]:
    """The records of the states in the folder, newest first."""
    return sorted(folder.glob("state-*.json"), reverse=True)
