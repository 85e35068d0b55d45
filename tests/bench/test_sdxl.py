"""bench.sdxl measures what it says: SDXL's own networks, counted; and its code runs, on a tiny configuration."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from bench.random_sdxl import SDXL, build_networks, unet_flops
from bench.sdxl import main


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """The bench silences the stages' log; the tests after it listen to that."""
    yield
    logging.getLogger("srpo").setLevel(logging.NOTSET)


def test_the_networks_are_sdxls_own_by_their_number_of_parameters() -> None:
    networks = build_networks(SDXL, "meta")
    counts = {name: sum(one.numel() for one in network.parameters()) for name, network in networks.items()}
    assert counts == {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    }


def test_a_unet_pass_is_676_tflop() -> None:
    assert unet_flops(SDXL) == pytest.approx(6.76e12, rel=0.01)


def test_the_tiny_configuration_goes_the_same_way(capsys: pytest.CaptureFixture) -> None:
    main(["--tiny", "--batch-sizes", "2", "--train-batch-sizes", "2", "--steps", "2"])
    said = capsys.readouterr().out
    for row in ("generate, 2 at once", "train LoRA, 2 at once ", "train LoRA, 2 at once, checkpointing"):
        assert row in said
    assert "says nothing of SDXL" in said and "out of memory" not in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_without_a_gpu_it_refuses_in_one_line() -> None:
    with pytest.raises(SystemExit, match=r"^bench.sdxl: .*--tiny"):
        main([])
