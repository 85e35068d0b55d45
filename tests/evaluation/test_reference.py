"""The reference cache: used when it is the same set and the same eyes, and never otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from srpo.data import parquet
from srpo.data.images import encode_png
from srpo.data.schemas import IMAGE
from srpo.errors import UserError
from srpo.evaluation.features import Extractor
from srpo.evaluation.frechet import frechet_distance, gaussian
from srpo.evaluation.reference import load_reference


class Eyes:
    """An extractor that counts what it looked at."""

    def __init__(self, identity="eyes") -> None:
        self.seen, self.extractor = 0, Extractor(self.features, identity)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def write(path: Path, seed: int = 0, sizes: tuple[int, ...] = (8,) * 10) -> Path:
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 255, (size, size, 3), dtype=np.uint8) for size in sizes]
    parquet.write_table(path, [{"image": encode_png(p)} for p in images], {"image": IMAGE})
    return path


def test_second_call_reads_the_cache(tmp_path: Path) -> None:
    path, first, second = write(tmp_path / "r.parquet"), Eyes(), Eyes()
    one, two = (load_reference(path, eyes.extractor, tmp_path / "cache") for eyes in (first, second))
    assert (first.seen, second.seen) == (10, 0)
    assert np.array_equal(one.features, two.features) and one.features.shape == (10, 12)
    assert np.allclose(one.gaussian.covariance, np.cov(one.features.astype(float), rowvar=False))
    assert np.array_equal(one.gaussian.covariance, two.gaussian.covariance)
    other = gaussian(one.features[:7])
    assert frechet_distance(other, one.gaussian) == frechet_distance(other, two.gaussian)


def test_other_data_or_extractor_misses_the_cache(tmp_path: Path) -> None:
    path, cache, eyes = write(tmp_path / "r.parquet"), tmp_path / "cache", Eyes()
    first = load_reference(path, eyes.extractor, cache)
    write(path, seed=1)
    second = load_reference(path, eyes.extractor, cache)
    assert eyes.seen == 20 and not np.array_equal(first.features, second.features)
    load_reference(path, Eyes("other eyes").extractor, cache)
    assert len(list(cache.iterdir())) == 3
    write(path)
    assert np.array_equal(load_reference(path, eyes.extractor, cache).features, first.features)
    assert eyes.seen == 20


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped bit", "another set's"])
def test_damaged_cache_is_not_used(tmp_path: Path, damage: str, caplog) -> None:
    path, cache, eyes = write(tmp_path / "r.parquet"), tmp_path / "cache", Eyes()
    good = load_reference(path, eyes.extractor, cache).features
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "flipped bit":
        content[-3] ^= 1
    file.write_bytes({"cut": content[:-9], "empty": b"", "flipped bit": content, "another set's": b"x" * 99}[damage])
    assert np.array_equal(load_reference(path, eyes.extractor, cache).features, good)
    assert eyes.seen == 20 and "damaged" in caplog.text
    load_reference(path, eyes.extractor, cache)
    assert eyes.seen == 20, "not mended"


def test_no_identity_no_cache(tmp_path: Path) -> None:
    path, eyes = write(tmp_path / "r.parquet"), Eyes(None)
    for _ in range(2):
        load_reference(path, eyes.extractor, tmp_path / "cache")
    assert eyes.seen == 20 and not (tmp_path / "cache").exists()


def test_image_sizes_may_differ(tmp_path: Path) -> None:
    mixed = load_reference(write(tmp_path / "m.parquet", sizes=(8, 6, 12, 8)), Eyes().extractor, tmp_path / "cache")
    assert mixed.features.shape == (4, 12)
    with pytest.raises(UserError, match="2 reference images are too few"):
        load_reference(write(tmp_path / "f.parquet", sizes=(8, 8)), Eyes().extractor, tmp_path / "cache")
    parquet.write_table(tmp_path / "n.parquet", [{"text": "x"}], {"text": pa.string()})
    with pytest.raises(UserError, match=r"n\.parquet: has no column 'image'"):
        load_reference(tmp_path / "n.parquet", Eyes().extractor, tmp_path / "cache")
