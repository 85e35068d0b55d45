"""Reserved reward names: those of columns and of all keys that an evaluation writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from srpo.config.loader import Params, load_params
from srpo.data.metric_keys import HEADLINE, RESERVED_KEYS, name_conflict
from srpo.data.records import read_metrics, read_sweep
from srpo.data.schemas import CANDIDATE_FIELDS, WINNER_FIELDS
from srpo.errors import UserError
from srpo.rounds import RoundFiles
from tests.support.campaign import build_campaign


@pytest.mark.parametrize("name", ["latents_shape", "loser_latents", "judge_low", "kid_low", "saturation_std"])
def test_taken_names_are_refused(name: str, world: Path) -> None:
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("  accuracy: {kind", f"  {name}: {{kind"))
    with pytest.raises(UserError, match=rf"rewards\.{name}: a .* has this name; rename the reward") as error:
        load_params()
    assert "\n" not in str(error.value)


def test_conflicts_between_rewards() -> None:
    rewards = ["judge", "judge_low", "judge_win_rate", "judge_lower"]
    assert [bool(name_conflict(name, rewards)) for name in rewards] == [False, True, True, False]
    assert name_conflict("judge_low", ["judge_low", "other"]) is None


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> tuple[Params, Path]:
    root = tmp_path_factory.mktemp("campaign")
    return build_campaign(root, ("001",)), root


def test_every_key_of_a_record_is_reserved_or_a_rewards(campaign: tuple[Params, Path]) -> None:
    params, root = campaign
    rewards = params.rewards
    for key in ("base", "001"):
        metrics = read_metrics(RoundFiles(root, key))
        sweep = read_sweep(RoundFiles(root, key))
        made = {*metrics, *next(iter(sweep.values()))} - rewards.keys()
        assert {name for name in made if name_conflict(name, rewards) is None} == set()
    assert set(HEADLINE) <= RESERVED_KEYS and {*CANDIDATE_FIELDS, *WINNER_FIELDS}.isdisjoint({"judge"})
