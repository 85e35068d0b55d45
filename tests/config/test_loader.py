"""params.yaml: what ships is valid, what is wrong is named in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from srpo.config.loader import load_params
from srpo.config.tree import ancestors, check_tree, order
from srpo.errors import UserError

REPO = Path(__file__).parents[2]


def changed(tmp_path: Path, old: str, new: str) -> Path:
    text = (REPO / "params.yaml").read_text()
    assert old in text
    path = tmp_path / "params.yaml"
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize("file", ["params.yaml", *sorted(f"presets/{p.name}" for p in (REPO / "presets").iterdir())])
def test_shipped_params_are_valid(file: str) -> None:
    params = load_params(REPO / file)
    for key in params.rounds:
        params.for_round(key)


def test_the_tiny_preset_is_the_shipped_file() -> None:
    assert (REPO / "presets" / "tiny.yaml").read_text() == (REPO / "params.yaml").read_text()


def test_a_family_brings_its_published_model(tmp_path: Path) -> None:
    rewards = load_params(changed(tmp_path, "kind: clip, model: data/reward", "kind: pickscore")).rewards
    assert rewards["reward"].model == "yuvalkirstain/PickScore_v1" and len(rewards["reward"].revision) == 40
    assert (rewards["judge"].model, rewards["judge"].revision) == ("data/judge", None)


def test_overrides_reach_only_their_round(tmp_path: Path) -> None:
    path = changed(
        tmp_path,
        '  "003":\n    parent: "002"\n    generate: {}',
        '  "003":\n    parent: "002"\n    generate: {candidates_per_prompt: 4}',
    )
    params = load_params(path)
    counts = [params.for_round(key).generate.candidates_per_prompt for key in params.rounds]
    assert counts[-1] == 4 and 4 not in counts[:-1]


BAD = {
    "missing key": ("seed: 0\n", "", "seed: missing"),
    "wrong type": ("seed: 0\n", "seed: many\n", "seed: Input should be a valid integer, not 'many'"),
    "out of range": (
        "top_fraction: 1.0",
        "top_fraction: 1.5",
        "select.top_fraction: Input should be less than or equal to 1",
    ),
    "no cluster": (
        "runtime:\n",
        "runtime:\n  cluster: 10.0.0.1\n",
        "runtime.cluster: '10.0.0.1' is no cluster; write local, auto, <host>:<port> or ray://<host>:<port>",
    ),
    "unknown key": ("seed: 0\n", "seed: 0\nsead: 1\n", "sead: unknown key"),
    "unknown reward": (
        "kind: clip, model: data/reward",
        "kind: clap, model: data/reward",
        "rewards.reward.kind: unknown reward 'clap'",
    ),
    "reward without a model": (
        'kind: "demo.judge:SceneJudge"',
        "kind: templates",
        "rewards.accuracy.model: missing; templates has no default model",
    ),
    "unknown combination": (
        "top_fraction: 1.0",
        "combine: vote",
        "select.combine: Input should be 'zscore', 'rank' or 'beats_mean', not 'vote'",
    ),
    "no judge": (
        "model: data/judge, role: judge",
        "model: data/judge, role: select",
        "evaluate.features: 'judge' is not a reward with role judge",
    ),
    "features of a reward": (
        "features: judge",
        "features: reward",
        "evaluate.features: 'reward' is not a reward with role judge",
    ),
    "Inception and no CLIP": (
        "features: judge",
        "features: inception",
        "evaluate.clip_features: missing; name a judge",
    ),
    "a reward named as a metric": (
        "  accuracy: {kind",
        "  fid: {kind",
        "rewards.fid: a metric of every evaluation has this name; rename the reward",
    ),
    "unknown parent": ('parent: "002"', 'parent: "007"', "003.parent: no round '007'"),
    "cyclic parents": ('"001":\n    parent: base', '"001":\n    parent: "003"', "the parents form a cycle"),
    "unquoted round": ('"003":', "003:", 'quote it, as in "003"'),
    "bad round name": ('"003":', '"../3":', "is not a valid name"),
    "missing override section": (
        "    select: {}\n    train: {}\n\nmodel",
        "    select: {}\n\nmodel",
        "rounds.003.train: missing; write {}",
    ),
    "bad override": (
        "parent: base\n    generate: {}",
        "parent: base\n    generate: {guidance_scale: 0.5}",
        "rounds.001.generate.guidance_scale",
    ),
    "unknown override": (
        "parent: base\n    generate: {}",
        "parent: base\n    generate: {cfg: 3.0}",
        "rounds.001.generate.cfg: unknown key",
    ),
    "a rejection that rejects none": (
        "prompts_per_shard: 50",
        "prompts_per_shard: 50\n  early_rejection: {reward: reward, checkpoints: [{step: 4, keep: 8}]}",
        "generate: early_rejection.checkpoints: keep 8 rejects no candidate",
    ),
    "a rejection after the last step": (
        "prompts_per_shard: 50",
        "prompts_per_shard: 50\n  early_rejection: {reward: reward, checkpoints: [{step: 12, keep: 2}]}",
        "generate: early_rejection.checkpoints: step 12 is not before the last step",
    ),
    "rejections that do not narrow": (
        "prompts_per_shard: 50",
        "prompts_per_shard: 50\n  early_rejection:"
        " {reward: reward, checkpoints: [{step: 4, keep: 2}, {step: 6, keep: 2}]}",
        "generate.early_rejection: checkpoints: each must have a later step and a smaller keep",
    ),
    "a judge that rejects": (
        "prompts_per_shard: 50",
        "prompts_per_shard: 50\n  early_rejection: {reward: judge, checkpoints: [{step: 4, keep: 2}]}",
        "generate.early_rejection.reward: 'judge' is not a reward with role select",
    ),
    "a round's rejection that DVC does not follow": (
        "parent: base\n    generate: {}",
        "parent: base\n    generate: {early_rejection: {reward: reward, checkpoints: [{step: 4, keep: 2}]}}",
        "rounds.001.generate.early_rejection.reward: must be that of generate.early_rejection",
    ),
    "another method than the parent's": (
        'parent: "002"\n    generate: {}\n    select: {}\n    train: {}',
        'parent: "002"\n    generate: {}\n    select: {}\n    train: {method: full}',
        "rounds.003.train.method: differs from parent 002",
    ),
    "reported guidance not in sweep": ("guidance_scales: [", "guidance_scales: [29.0, ", None),
    "not yaml": ("seed: 0\n", "seed: [\n", "not valid YAML"),
    "duplicate key": ("seed: 0\n", "seed: 0\nseed: 1\n", "not valid YAML"),
}


@pytest.mark.parametrize("name", [name for name, case in BAD.items() if case[2]])
def test_bad_params_give_one_clear_line(name: str, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch) -> None:
    from srpo import cli

    old, new, expected = BAD[name]
    changed(tmp_path, old, new)
    monkeypatch.chdir(tmp_path)
    assert cli.run(["generate", "001"]) == 2
    error = capfd.readouterr().err.strip()
    assert expected in error and error.startswith("srpo: error: params.yaml: ")
    assert "\n" not in error
    assert {entry.name for entry in tmp_path.iterdir()} == {"params.yaml"}, "something was written"


def test_missing_file_and_unknown_round(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_params(tmp_path / "params.yaml")
    shutil.copy(REPO / "params.yaml", tmp_path)
    with pytest.raises(UserError, match=r"rounds\.009: no such round"):
        load_params(tmp_path / "params.yaml").for_round("009")


def test_tree_order_and_ancestors() -> None:
    params = load_params(REPO / "params.yaml")
    node = params.rounds["001"]
    tree = {
        key: node.model_copy(update={"parent": parent})
        for key, parent in {"b": "a", "c": "b", "a": "base", "a2": "base"}.items()
    }
    assert order(tree) == ["a", "a2", "b", "c"]
    assert ancestors(tree, "c") == ["a", "b"]
    with pytest.raises(ValueError, match="cycle"):
        check_tree({"x": "y", "y": "x"})
