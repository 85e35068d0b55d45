"""bench.sdxl_round: its reward models are read as published ones, and its round runs to the end."""

from __future__ import annotations

import pytest
import torch

from bench.random_rewards import TINY, make_clip, open_clip_state
from bench.sdxl_round import STAGES, main
from srpo.rewards.convert import clip_from_open_clip


def test_open_clips_names_are_read_back() -> None:
    state = make_clip(TINY, torch.device("cpu")).float().state_dict()
    found = clip_from_open_clip(open_clip_state(state)).state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.slow
def test_the_tiny_round_goes_the_same_way(capfd: pytest.CaptureFixture) -> None:
    main(["--tiny", "--prompts", "2", "--candidates", "2"])
    said = capfd.readouterr().out
    assert "tiny networks" in said
    for stage in STAGES:
        assert f"{' '.join(stage)}: " in said
