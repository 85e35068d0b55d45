"""Imported candidates: their images become latents, once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from srpo.config.loader import Params
from srpo.config.schema import ImageSize
from srpo.data import parquet
from srpo.data.images import decode_image, image_size
from srpo.data.imported import imported_shards
from srpo.data.prompts import Prompt, check_disjoint, load_prompts
from srpo.data.schemas import CANDIDATE_FIELDS
from srpo.errors import UserError
from srpo.lineage.record import check_base
from srpo.models.pipeline import TEXT_PARTS, load_pipeline
from srpo.models.tokenizer import load_tokenizer, text_read
from srpo.rounds import Round
from srpo.runtime import distributed
from srpo.runtime.device import pick_device, pick_dtype
from srpo.runtime.inputs import model_inputs
from srpo.runtime.make_units import make_units
from srpo.runtime.units import Make, Units
from srpo.sampling.sizes import allowed_sizes, names_of
from srpo.storage.files import publish
from srpo.storage.scratch import scratch_folder


class ImageEncoder:
    """The base's VAE as an encoder. It sees one image at a time, so no bit depends on the batch size."""

    def __init__(self, params: Params) -> None:
        self.device = pick_device(params.runtime)
        dtype = pick_dtype(params.runtime, self.device)
        vae = load_pipeline(params.model, dtype, unet=None, **dict.fromkeys(TEXT_PARTS)).vae
        self.vae = vae.to(self.device, torch.float32 if vae.config.force_upcast else dtype).eval()

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Return latents float16 [channels, height / 8, width / 8] of uint8 pixels [height, width, 3].

        They are the mean of the VAE's distribution, scaled as the UNet reads them.
        """
        image = torch.tensor(pixels).permute(2, 0, 1)[None].to(self.device, self.vae.dtype) / 127.5 - 1
        latents = self.vae.encode(image).latent_dist.mode().float()
        config = self.vae.config
        if config.latents_mean is not None and config.latents_std is not None:
            mean = latents.new_tensor(config.latents_mean).view(1, -1, 1, 1)
            latents = (latents - mean) / latents.new_tensor(config.latents_std).view(1, -1, 1, 1)
        return (latents * config.scaling_factor)[0].half().cpu().numpy()


def encode_candidates(round: Round) -> None:
    """Write `rounds/<key>/candidates/` from the images that `generate.candidates` names, one shard per shard.

    Shards that an interrupted run finished are kept. With `runtime.processes` above 1 this process starts workers.

    Raises:
        UserError: the folder is missing or changed, is of another size or round, or shares a prompt with prompts.eval.
    """
    params, settings = round.params, round.params.generate
    assert settings.candidates
    sources = imported_shards(round.root / settings.candidates, round.key)
    _check(round, sources)
    inputs = {
        "candidates": settings.candidates, "model": params.model.model_dump(),
        "sizes": [size.model_dump() for size in allowed_sizes(settings)],
    }  # fmt: skip
    scratch = scratch_folder(round.root, "generate", round.key, inputs)
    shards = {f"shard-{number:05d}-of-{len(sources):05d}.parquet": path for number, path in enumerate(sources)}
    inside = settings.candidates if not Path(settings.candidates).is_absolute() else None
    places = {name: f"{settings.candidates}/{path.name}" for name, path in shards.items()}
    make_units(
        Units(
            round,
            "generate",
            [scratch / name for name in shards],
            partial(_load, places),
            model_inputs(round),
            lambda unit: [shards[unit.name]] if inside else [],
            partial(check_base, round.root),
        )
    )
    if not distributed.is_worker():
        publish(scratch, round.files.candidates)


@contextmanager
def _load(places: Mapping[str, str], round: Round) -> Iterator[Make]:
    """Load the encoder.

    Args:
        places: the imported shard of each unit, relative to the project, by the unit's name.
    """
    encoder = ImageEncoder(round.params)
    name = f"encode {round.key}"
    with tqdm(unit="img", desc=name, mininterval=2, disable=not distributed.draws_progress()) as progress:

        def make(unit: Path) -> None:
            rows = []
            for row in parquet.read_rows(round.root / places[unit.name]):
                latents = encoder.encode(np.asarray(decode_image(row["image"])))
                cells = {"latents": parquet.latents_bytes(latents), "latents_shape": list(latents.shape)}
                rows.append(row | cells)
                progress.update()
            parquet.write_table(unit, rows, CANDIDATE_FIELDS)

        yield make


def _check(round: Round, sources: list[Path]) -> None:
    """Check the prompts, and the first image's size and round."""
    settings, param = round.params.generate, f"rounds.{round.key}.generate.candidates"
    again = f"import them again with `srpo candidates import {round.key}`"
    first = next(parquet.read_rows(sources[0], ["candidate_id", "image"]))
    width, height = image_size(first["image"])
    allowed = allowed_sizes(settings)
    if ImageSize(width=width, height=height) not in allowed:
        raise UserError(f"{param}: images of {width} x {height}, not {names_of(allowed)}; {again}")
    if not first["candidate_id"].startswith(f"{round.key}-p"):
        raise UserError(f"{param}: imported for another round ({first['candidate_id']}); {again}")
    rows = (row for source in sources for row in parquet.read_rows(source, ["prompt_id", "prompt"]))
    prompts = {row["prompt"]: row["prompt_id"] for row in rows}
    evaluated = load_prompts(round.root / round.params.prompts.eval)
    read = text_read(round.params.model, load_tokenizer(round.params.model, round.root))
    check_disjoint([Prompt(name, text) for text, name in prompts.items()], evaluated, read)
