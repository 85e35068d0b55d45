"""The files of a project that a stage's units read, so that they can be sent to machines without a shared disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from srpo.config.reward_families import FAMILIES, find_family
from srpo.rounds import Round


def model_inputs(round: Round) -> list[Path]:
    """Return base's record, and the base model, VAE and LoRAs as far as they are in the project's folder."""
    model = round.params.model
    names = [model.base, model.vae, *(lora.path for lora in model.loras)]
    return [round.base_files.adapter, *_in_project(round.root, names)]


def reward_inputs(round: Round, names: Iterable[str]) -> list[Path]:
    """Return the models and the modules of these rewards as far as they are in the project's folder."""
    specs = [spec for name, spec in round.params.rewards.items() if name in set(names)]
    modules = [find_family(spec.kind).path.split(":")[0] for spec in specs if spec.kind not in FAMILIES]
    # of `package.module` the whole package
    sources = [name for module in modules for name in (module.split(".")[0], f"{module.split('.')[0]}.py")]
    return _in_project(round.root, [*(spec.model for spec in specs), *sources])


def _in_project(root: Path, names: Iterable[str | None]) -> list[Path]:
    """Return the paths that exist under root. An absolute path or a Hub id is looked up on each machine."""
    return [root / name for name in names if name and not Path(name).is_absolute() and (root / name).exists()]
