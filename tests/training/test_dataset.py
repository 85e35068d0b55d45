"""The training set: pooling, replay, and that ancestors' winners are those the lineage names. No models."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch

from srpo.config.loader import Params, load_params
from srpo.data import parquet
from srpo.data.schemas import LATENTS
from srpo.errors import UserError
from srpo.rounds import Round, RoundFiles
from srpo.storage.hashing import digest
from srpo.storage.json_files import write_json
from srpo.training.dataset import Winners, batch_indices, load_winners, winners_digests

REPO = Path(__file__).parents[2]
FIELDS = {
    "prompt": pa.string(),
    "latents": LATENTS,
    "latents_shape": pa.list_(pa.int32()),
    "weight": pa.float32(),
    "margin": pa.float32(),
    "loser_latents": LATENTS,
}
COUNTS = {"001": 5, "002": 4, "003": 3}
CODE = {"001": 100, "002": 200, "003": 300}


def write_winners(root: Path, key: str, size: int = 2, losers: bool = True, alone: int = 0, ties: int = 0) -> None:
    """Winner i of round k holds the number code(k) + i everywhere, its loser the negative of it."""
    rows = []
    for i in range(COUNTS[key]):
        value = np.full((4, size, size), CODE[key] + i, np.float16)
        rows.append(
            {
                "prompt": f"{key} {i}",
                "latents": parquet.latents_bytes(value),
                "latents_shape": [4, size, size],
                "weight": 1.0 + i,
                "margin": 0.0 if alone <= i < alone + ties else 1.0,
            }
            | {"loser_latents": None if i < alone else parquet.latents_bytes(-value)}
        )
    fields = FIELDS if losers else {name: kind for name, kind in FIELDS.items() if name != "loser_latents"}
    parquet.write_table(RoundFiles(root, key).winners / "shard-00000.parquet", rows, fields)


def write_lineages(root: Path) -> None:
    for key, parent in (("001", "base"), ("002", "001")):
        ancestors = {"001": digest(RoundFiles(root, "001").winners)} if key == "002" else {}
        lineage = {"parent": parent, "winners": digest(RoundFiles(root, key).winners), "ancestors": ancestors}
        write_json(RoundFiles(root, key).adapter / "lineage.json", lineage)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for key in COUNTS:
        write_winners(tmp_path, key)
    write_lineages(tmp_path)
    return tmp_path


def params(**train) -> Params:
    loaded = load_params(REPO / "params.yaml")
    return loaded.model_copy(update={"train": loaded.train.model_copy(update={"replay": 0.0} | train)})


def load(round: Round, *, pairs: bool) -> Winners:
    return load_winners(round, winners_digests(round), pairs=pairs)


def codes(winners, rows: torch.Tensor) -> list[int]:
    return winners.latents(rows)[:, 0, 0, 0].int().tolist()


def test_default_is_this_round_with_mean_weight_1(root: Path) -> None:
    assert winners_digests(Round.of(params(), root, "003")) == {"003": digest(RoundFiles(root, "003").winners)}
    winners = load(Round.of(params(), root, "003"), pairs=False)
    assert (winners.num_current, len(winners)) == (3, 3)
    assert winners.weights.tolist() == pytest.approx([0.5, 1.0, 1.5])
    drawn = [
        codes(winners, rows)
        for rows in itertools.islice(batch_indices(winners, params(batch_size=3).train, (0, "003")), 9)
    ]
    assert all(sorted(batch) == [300, 301, 302] for batch in drawn), "every epoch is a permutation of all"
    assert len({tuple(batch) for batch in drawn}) > 1


def test_start_base_pools_all_rounds_alike(root: Path) -> None:
    wanted = params(start="base", batch_size=4)
    winners = load(Round.of(wanted, root, "003"), pairs=True)
    assert list(winners_digests(Round.of(wanted, root, "003"))) == ["003", "001", "002"]
    assert [part.mean().item() for part in winners.weights.split([3, 5, 4])] == pytest.approx([1, 1, 1])
    every = torch.arange(len(winners))
    assert torch.equal(winners.latents(every, "loser_latents"), -winners.latents(every))
    assert [winners.prompts[i] for i in winners.prompt_indices] == [
        f"{key} {i}" for key in ("003", "001", "002") for i in range(COUNTS[key])
    ]
    assert winners.prompts == sorted(winners.prompts)
    drawn = [codes(winners, rows) for rows in itertools.islice(batch_indices(winners, wanted.train, (0, "003")), 3)]
    everything = [CODE[key] + i for key in COUNTS for i in range(COUNTS[key])]
    assert sorted(code for batch in drawn for code in batch) == everything


@pytest.mark.parametrize("start", ["parent", "base"])
@pytest.mark.parametrize(("replay", "size", "per_batch"), [(0.5, 4, {2}), (0.25, 8, {2}), (0.3, 4, {1, 2})])
def test_replay_is_a_share_of_every_batch(root: Path, start: str, replay: float, size: int, per_batch: set) -> None:
    wanted = params(start=start, replay=replay, batch_size=size)
    winners = load(Round.of(wanted, root, "003"), pairs=False)
    stream = batch_indices(winners, wanted.train, (0, "003"))
    drawn = [codes(winners, rows) for rows in itertools.islice(stream, 20)]
    earlier = [sum(code < 300 for code in batch) for batch in drawn]
    assert all(len(batch) == size for batch in drawn)
    assert set(earlier) == per_batch and sum(earlier) == round(replay * size * 20)
    replayed = [code for batch in drawn for code in batch if code < 300]
    assert len(set(replayed[:9])) == 9, "all of the ancestors' winners come before one comes again"
    again = batch_indices(winners, wanted.train, (0, "003"))
    assert drawn == [codes(winners, rows) for rows in itertools.islice(again, 20)]


def test_a_first_round_has_nothing_to_replay(root: Path) -> None:
    wanted = params(replay=0.5, batch_size=4, start="base")
    winners = load(Round.of(wanted, root, "001"), pairs=False)
    assert list(winners_digests(Round.of(wanted, root, "001"))) == ["001"]
    assert len(next(batch_indices(winners, wanted.train, (0, "001")))) == 4


def test_ancestors_winners_must_match_the_lineage(root: Path) -> None:
    wanted, folder = params(replay=0.5), RoundFiles(root, "001").winners
    write_winners(root, "001", alone=1)
    with pytest.raises(UserError, match=r"001/winners: not the winners that the adapter of round 002 was trained on"):
        load(Round.of(wanted, root, "003"), pairs=False)
    folder.rename(root / "elsewhere")
    with pytest.raises(UserError, match=r"rounds/001/winners: missing; `dvc pull select@001`"):
        load(Round.of(wanted, root, "003"), pairs=False)
    write_json(RoundFiles(root, "002").adapter / "lineage.json", {"winners": "0"})
    with pytest.raises(UserError, match=r"002/adapter/lineage\.json: does not name the winners of 001"):
        load(Round.of(wanted, root, "003"), pairs=False)
    load(Round.of(params(), root, "003"), pairs=False)  # who asks for no ancestors needs none


def test_losses_on_pairs_need_losers(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_winners(root, "003", alone=1)
    winners = load(Round.of(params(), root, "003"), pairs=True)
    assert winners.prompts == ["003 1", "003 2"] and codes(winners, torch.tensor([1, 0])) == [302, 301]
    assert "left out 1 winners without a loser and 0" in caplog.text
    assert winners.weights.tolist() == pytest.approx([0.8, 1.2])
    for alone, ties in ((3, 0), (0, 3), (1, 2)):
        write_winners(root, "003", alone=alone, ties=ties)
        with pytest.raises(UserError, match="no winner has a loser with a lower score"):
            load(Round.of(params(), root, "003"), pairs=True)
    write_winners(root, "003", losers=False)
    with pytest.raises(UserError, match="winners lack loser_latents; rerun select"):
        load(Round.of(params(), root, "003"), pairs=True)
    assert load(Round.of(params(), root, "003"), pairs=False).num_current == 3


def test_ties_are_no_pairs(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_winners(root, "003", alone=1, ties=1)
    winners = load(Round.of(params(), root, "003"), pairs=True)
    assert winners.prompts == ["003 2"] and codes(winners, torch.tensor([0])) == [302]
    assert "left out 1 winners without a loser and 1 whose prompt's candidates all have the same" in caplog.text
    assert len(load(Round.of(params(), root, "003"), pairs=False)) == 3


def test_rounds_may_have_other_sizes(root: Path) -> None:
    write_winners(root, "003", size=4)
    winners = load(Round.of(params(replay=0.5), root, "003"), pairs=False)
    order = torch.tensor([len(winners) - 1, 0, 1, len(winners) - 2])
    found = winners.latents_of_any_size(order)
    assert [tuple(latents.shape) for latents in found] == [(4, 2, 2), (4, 4, 4), (4, 4, 4), (4, 2, 2)]
    for latents, index in zip(found, order, strict=True):
        assert torch.equal(latents, winners.latents(index[None])[0])


def test_zero_weights_do_not_become_nan(root: Path) -> None:
    shard = RoundFiles(root, "003").winners / "shard-00000.parquet"
    pl.read_parquet(shard).with_columns(pl.lit(0.0).cast(pl.Float32).alias("weight")).write_parquet(shard)
    with pytest.raises(UserError, match="weight"):
        load(Round.of(params(), root, "003"), pairs=False)
