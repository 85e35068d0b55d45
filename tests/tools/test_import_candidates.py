"""Candidates from elsewhere: images with prompts and pairs with labels go through generate, score, select and train.

python -m pytest tests/tools/test_import_candidates.py
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from srpo.cli import run
from srpo.config.loader import load_params
from srpo.data import parquet
from srpo.data.images import decode_image
from srpo.errors import UserError
from srpo.rounds import Round, RoundFiles
from srpo.sampling.encoding import ImageEncoder
from srpo.stages.base import pin_base
from srpo.stages.generate import generate
from srpo.stages.score import score
from srpo.stages.select import select
from srpo.stages.train import train
from tests.support.world import SIZE

PROMPTS = ["a red circle", "a green square"]


def png(seed: int, width: int = 48, height: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_pairs(path: Path, labels: list[tuple[float, float]]) -> Path:
    rows = [
        {"jpg_0": png(2 * i), "jpg_1": png(2 * i + 1), "label_0": first, "label_1": second, "caption": PROMPTS[i % 2]}
        for i, (first, second) in enumerate(labels)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_folder(folder: Path) -> Path:
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.png").write_bytes(png(i))
        (folder / f"{i}.txt").write_text(PROMPTS[i // 3] + " --ar 3:2")
    (folder / "no-caption.png").write_bytes(png(9))
    return folder


def imported(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    """Run the command, and return the values that it prints for params.yaml."""
    capsys.readouterr()
    assert run(["candidates", "import", *map(str, arguments)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [lines[0], *(line.split(": ")[-1].rstrip("}") for line in lines if "{" in line)]


def set_round(**sections: dict) -> None:
    from ruamel.yaml import YAML

    raw = YAML(typ="safe").load(Path("params.yaml").read_text())
    for section, values in sections.items():
        raw["rounds"]["001"][section] = values
    Path("params.yaml").write_text(json.dumps(raw))


def ready(world: Path) -> Round:
    params = load_params()
    pin_base(Round.of(params, world, "base"))
    return Round.of(params, world, "001")


def test_a_folder_becomes_a_round(world: Path, capsys) -> None:
    summary, name = imported(capsys, "001", write_folder(world / "liked"))
    assert summary == "5 images of 2 prompts, 0 pairs; left out 1 without a prompt"
    set_round(generate={"candidates": name})
    round = ready(world)
    for stage in (generate, score, select, train):
        stage(round)
    rows = list(parquet.read_rows(round.files.candidates))
    assert [(row["prompt"], row["index"]) for row in rows] == [(PROMPTS[i // 3], i % 3) for i in range(5)]
    assert all(decode_image(row["image"]).size == (SIZE, SIZE) for row in rows)
    encoder = ImageEncoder(round.params)
    for row in rows:
        latents = encoder.encode(np.asarray(decode_image(row["image"])))
        assert np.array_equal(parquet.latents_array(row), latents) and latents.shape == (4, SIZE // 8, SIZE // 8)
    assert {row["prompt"] for row in parquet.read_rows(round.files.winners)} == set(PROMPTS)
    assert (round.files.adapter / "lineage.json").exists()
    before = {file.name: file.read_bytes() for file in round.files.candidates.iterdir()}
    generate(round)
    assert {file.name: file.read_bytes() for file in round.files.candidates.iterdir()} == before


def test_images_get_the_size_of_the_closest_shape(world: Path, capsys) -> None:
    """All images of a prompt have one size."""
    sizes = [{"width": width, "height": height} for width, height in ((32, 32), (24, 48), (48, 24))]
    set_round(generate={"sizes": sizes})
    shapes = {"a red circle": (50, 90), "a green square": (90, 50), "a red square": (41, 40)}
    folder = world / "liked"
    folder.mkdir()
    for prompt, (width, height) in shapes.items():
        for number in range(2):  # the second has another shape, and follows the first
            (folder / f"{prompt}-{number}.png").write_bytes(png(number, 60 if number else width, height))
            (folder / f"{prompt}-{number}.txt").write_text(prompt)
    _, name = imported(capsys, "001", folder)
    set_round(generate={"candidates": name, "sizes": sizes})
    round = ready(world)
    generate(round)
    found = {}
    for row in parquet.read_rows(round.files.candidates):
        width, height = decode_image(row["image"]).size
        assert parquet.latents_array(row).shape == (4, height // 8, width // 8)
        found.setdefault(row["prompt"], []).append((width, height))
    assert [found[prompt] for prompt in shapes] == [[(24, 48)] * 2, [(48, 24)] * 2, [(32, 32)] * 2]
    set_round(generate={"candidates": name, "sizes": sizes[1:2]})
    with pytest.raises(UserError, match=r"images of 48 x 24, not 24 x 48; import them again"):
        generate(ready(world))


@pytest.mark.parametrize("objective", ["dpo", "nft"])
def test_pairs_give_winners_and_losers(world: Path, capsys, objective: str) -> None:
    labels = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.0, 1.0), (1.0, 0.0)]
    summary, name, picks = imported(capsys, "001", write_pairs(world / "pairs.parquet", labels), "--column", "caption")
    assert summary == "8 images of 4 prompts, 4 pairs; left out 1 pairs without a winner"
    set_round(generate={"candidates": name}, select={"picks": picks}, train={"objective": objective})
    round = ready(world)
    for stage in (generate, score, select, train):
        stage(round)
    winners = list(parquet.read_rows(round.files.winners))
    rows = {row["candidate_id"]: row for row in parquet.read_rows(round.files.candidates)}
    assert len(winners) == 4
    for winner, place in zip(winners, [0, 3, 7, 8], strict=True):
        own = Image.open(io.BytesIO(png(place))).convert("RGB")
        other = Image.open(io.BytesIO(png(place ^ 1))).convert("RGB")
        assert closest(winner["image"], own, other) == 0
        assert winner["loser_latents"] == rows[winner["loser_id"]]["latents"] != winner["latents"]
        assert closest(rows[winner["loser_id"]]["image"], own, other) == 1
    assert "left out" not in capsys.readouterr().err  # no pair is a tie, whatever the rewards say


def closest(cell: dict, *images: Image.Image) -> int:
    from PIL import ImageOps

    shown = np.asarray(decode_image(cell), float)
    fitted = [np.asarray(ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.LANCZOS), float) for image in images]
    return int(np.argmin([np.abs(shown - other).mean() for other in fitted]))


def test_a_parquet_file_and_metadata_are_read(world: Path, capsys) -> None:
    rows = [{"image": {"bytes": png(i), "path": None}, "text": PROMPTS[i % 2]} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), world / "images.parquet")
    folder = world / "hub"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(7))
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": PROMPTS[0]}) + "\n")
    summary, name = imported(capsys, "001", world / "images.parquet", folder, "--column", "text", "--to", "elsewhere")
    assert summary == "4 images of 2 prompts, 0 pairs" and name.startswith("elsewhere/candidates-")
    again = imported(capsys, "001", world / "images.parquet", folder, "--column", "text", "--to", "elsewhere")
    assert again[1] == name and len(list((world / "elsewhere").iterdir())) == 1


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda world: write_pairs(world / "x.parquet", [(1.0, 0.0)]), "has no column 'prompt'; it has jpg_0"),
        (lambda world: world / "nowhere", "nowhere: no such file or folder; name a parquet file"),
        (lambda world: world / "data" / "reward", "reward: no images; a folder of"),
        (lambda world: broken(world), "bad.png: not a readable image"),
    ],
)
def test_a_bad_source_is_one_line(world: Path, capsys, prepare, words: str) -> None:
    source = prepare(world)
    assert run(["candidates", "import", "001", str(source)]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
    assert not list((world / "data").glob("*candidates*"))


def broken(world: Path) -> Path:
    folder = write_folder(world / "broken")
    (folder / "bad.png").write_bytes(b"no image")
    (folder / "bad.txt").write_text("a prompt")
    return folder


def test_generate_refuses_what_does_not_fit(world: Path, capsys) -> None:
    _, name = imported(capsys, "002", write_folder(world / "liked"))
    set_round(generate={"candidates": name})
    with pytest.raises(UserError, match=r"^rounds\.001\.generate\.candidates: imported for another round \(002-p"):
        generate(ready(world))
    set_round(generate={"candidates": name, "height": 64})
    with pytest.raises(UserError, match=r"images of 32 x 32, not 32 x 64; import them again"):
        generate(ready(world))
    _, name = imported(capsys, "001", world / "liked")
    shard = next((world / name).iterdir())
    shard.write_bytes(shard.read_bytes() + b"x")
    set_round(generate={"candidates": name})
    with pytest.raises(UserError, match=r"changed since it was written"):
        generate(ready(world))
    set_round(generate={"candidates": "data/mine"})
    with pytest.raises(UserError, match=r"mine: `srpo candidates import 001` writes candidates-<hash>"):
        generate(ready(world))
    eval_prompt = json.loads((world / "data/prompts/eval.jsonl").read_text().splitlines()[0])["prompt"]
    (world / "liked/0.txt").write_text(eval_prompt)
    _, name = imported(capsys, "001", world / "liked")
    set_round(generate={"candidates": name})
    with pytest.raises(UserError, match=r"prompts\.eval: .* has the text of train prompt"):
        generate(ready(world))
    assert not RoundFiles(world, "001").candidates.exists()
