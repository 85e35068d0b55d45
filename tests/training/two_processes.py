"""What test_processes.py runs under torch's launcher: several trainings, each moved to `two/<case>` when done."""

from __future__ import annotations

import os
from pathlib import Path

from srpo.config.loader import Params, load_params
from srpo.rounds import Round, RoundFiles
from srpo.stages.train import train
from tests.training.helpers import with_runtime, with_train

CASES = {
    "sft": {"batch_size": 5},
    "dpo": {
        "objective": "dpo",
        "dpo_beta": 200.0,
        "batch_size": 4,
    },  # of round 002: with the parent's LoRA as a second adapter
    "replay": {"replay": 0.5, "batch_size": 3},
    # some passes have dropped captions only, which reach no text encoder
    "text": {"train_text_encoder": True, "objective": "nft", "batch_size": 4, "caption_dropout": 0.6},
}


def case(params: Params, name: str) -> tuple[str, Params]:
    """The round and the params of a case."""
    values = with_train(params, steps=4, lr_schedule="constant", warmup_steps=0, ema_decay=0.9, **CASES[name])
    return "001" if name in ("sft", "text") else "002", with_runtime(values, train_batch_size=1)


def main() -> None:
    """Run all cases; every call of on_step leaves its process' rank in `two/told`."""
    root, told = Path.cwd(), Path("two") / "told"
    told.parent.mkdir(exist_ok=True)

    def tell(metrics, step: int) -> None:
        with told.open("a") as file:
            file.write(os.environ["RANK"])

    for name in CASES:
        key, params = case(load_params(), name)
        train(Round.of(params, root, key), tell)
        if os.environ["RANK"] == "0":
            files, target = RoundFiles(root, key), told.parent / name
            target.mkdir()
            (target / "training.csv").write_bytes(files.training.read_bytes())
            (target / "adapter").mkdir()
            for file in files.adapter.iterdir():
                (target / "adapter" / file.name).write_bytes(file.read_bytes())


if __name__ == "__main__":
    main()
