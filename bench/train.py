"""Training on winners: the stage `train` against a plain script in the style of diffusers' SDXL LoRA example.

    python -m bench.train [--prompts 140] [--repeats 3]

Run it in the project's folder; it uses params.yaml's model and train settings. One candidate of each prompt stands for
its winner. Both train the same LoRA on the same winners for the same number of steps of the same size at the same
learning rates, and save it. The plain script does in every step what `train_text_to_image_lora_sdxl.py` does: read
images, encode them with the VAE, encode their captions with both text encoders. The table gives the best of the
repeats, which take turns: of the whole, model loading and saving included, and of the median
step.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.optimization import get_scheduler
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from rich.console import Console
from rich.table import Table
from torchvision.transforms.functional import normalize, pil_to_tensor

from bench.prompts import cut_prompts
from srpo.config.loader import Params, load_params
from srpo.data import parquet
from srpo.data.prompts import load_prompts
from srpo.data.schemas import CANDIDATE_FIELDS
from srpo.rounds import Round, RoundFiles
from srpo.runtime.device import pick_device, pick_dtype
from srpo.sampling.sampler import load_pipeline
from srpo.stages.base import pin_base
from srpo.stages.generate import generate
from srpo.stages.train import train


class Images(torch.utils.data.Dataset):
    """A folder of PNG files, each with its caption in a text file."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*.png"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        with Image.open(self.files[index]) as image:
            pixels = pil_to_tensor(image.convert("RGB")).float() / 255
        return normalize(pixels, [0.5], [0.5]), self.files[index].with_suffix(".txt").read_text(encoding="utf-8")


def by_hand(params: Params, root: Path, on_step: Callable[[], None]) -> None:
    """Everything in the loop."""
    settings, device = params.train, pick_device(params.runtime)
    dtype = pick_dtype(params.runtime, device)
    pipeline = load_pipeline(params.model, dtype).to(device)
    unet, vae = pipeline.unet, pipeline.vae
    for model in (unet, vae, pipeline.text_encoder, pipeline.text_encoder_2):
        model.requires_grad_(False)
    modules = list(settings.target_modules)
    unet.add_adapter(LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=modules))
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    counts = {"num_warmup_steps": settings.warmup_steps, "num_training_steps": settings.steps}
    rates = get_scheduler(settings.lr_schedule, optimizer, **counts)
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    loader = torch.utils.data.DataLoader(Images(root / "images"), settings.batch_size, shuffle=True, drop_last=True)
    step, size = 0, [params.generate.height, params.generate.width]
    unet.train()
    while step < settings.steps:
        for pixels, captions in loader:
            with torch.no_grad():
                clean = vae.encode(pixels.to(device, vae.dtype)).latent_dist.sample() * vae.config.scaling_factor
                tokens, _, pooled, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
            clean = clean.to(dtype)
            noise = torch.randn_like(clean)
            timesteps = torch.randint(0, schedule.config.num_train_timesteps, (len(clean),), device=device)
            time_ids = torch.tensor([[*size, 0, 0, *size]], device=device, dtype=dtype).expand(len(clean), -1)
            predicted = unet(
                schedule.add_noise(clean, noise, timesteps),
                timesteps,
                tokens,
                added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
            ).sample
            loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
            loss.item()  # the script shows it in its bar
            step += 1
            on_step()
            if step == settings.steps:
                break
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionXLPipeline.save_lora_weights(root / "lora", unet_lora_layers=layers)


def by_srpo(params: Params, root: Path, on_step: Callable[[], None]) -> None:
    """The stage itself, from the start."""
    train(Round.of(params, root, next(iter(params.rounds))), lambda metrics, step: on_step())


def write_winners(params: Params, root: Path) -> None:
    """The first candidate of each prompt as its winner, for `train` and as files."""
    key = next(iter(params.rounds))
    files, images = RoundFiles(root, key), root / "images"
    generate(Round.of(params, root, key))
    rows = [row | {"weight": 1.0} for row in parquet.read_rows(files.candidates) if row["index"] == 0]
    fields = CANDIDATE_FIELDS | {"weight": pa.float32()}
    parquet.write_table(files.winners / "shard-00000.parquet", rows, fields)
    images.mkdir()
    for row in rows:
        (images / f"{row['prompt_id']}.png").write_bytes(row["image"]["bytes"])
        (images / f"{row['prompt_id']}.txt").write_text(row["prompt"], encoding="utf-8")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=140)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    logging.getLogger("srpo").setLevel(logging.ERROR)
    params, project = load_params(), Path.cwd()
    params = params.model_copy(
        update={"generate": params.generate.model_copy(update={"candidates_per_prompt": 2, "early_rejection": None})}
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for path in (params.prompts.train, params.prompts.eval):
            cut_prompts(project / path, root / path, arguments.prompts)
        if (project / params.model.base).is_dir():
            (root / params.model.base).symlink_to(project / params.model.base)
        pin_base(Round.of(params.model_copy(update={"rewards": {}}), root, "base"))
        write_winners(params, root)
        count = len(load_prompts(root / params.prompts.train))
        ways = {"encoders in the loop": by_hand, "srpo train": by_srpo}
        whole: dict[str, list[float]] = {name: [] for name in ways}
        loop: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.repeats):
            for name, way in ways.items():
                shutil.rmtree(root / ".srpo", ignore_errors=True)
                ends: list[float] = []
                start = time.perf_counter()
                way(params, root, lambda ends=ends: ends.append(time.perf_counter()))
                whole[name].append(time.perf_counter() - start)
                loop[name] += [float(np.median(np.diff(ends)))]
    settings, device = params.train, pick_device(params.runtime).type
    table = Table(title=f"{settings.steps} steps of {settings.batch_size} from {count} winners, on {device}")
    for column in ("way", "seconds", "times as fast", "median ms a step", "times as fast"):
        table.add_column(column, justify="left" if column == "way" else "right")
    firsts = min(next(iter(whole.values()))), min(next(iter(loop.values())))
    for name in ways:
        seconds, step = min(whole[name]), min(loop[name])
        ratios = f"{firsts[0] / seconds:.2f}", f"{firsts[1] / step:.2f}"
        table.add_row(name, f"{seconds:.2f}", ratios[0], f"{1000 * step:.1f}", ratios[1])
    Console().print(table)


if __name__ == "__main__":
    main()
