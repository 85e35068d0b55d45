"""bench.sdxl measures what it says: SDXL's own networks, counted; and its code runs, on a tiny configuration."""

from __future__ import annotations

import pytest

from bench.random_sdxl import SDXL, build_networks, unet_flops



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
