"""Bad input of every kind: one line that names the key or file, status 2, and nothing written."""

from __future__ import annotations

import shutil
import struct
import zlib
from pathlib import Path

import pytest

from srpo import cli
from tests.faults.project import Change, content, listing, param, prompts, replaced
from tests.support.campaign import build_campaign

ROUND = {"parent": "base", "generate": {}, "select": {}, "train": {}}
GOOD = '{"id": "ok", "prompt": "a red circle"}'
HUGE = 10**30


def refused(root: Path, argv: list[str], expected: str, capfd: pytest.CaptureFixture) -> None:
    """Assert that the command says `expected` in its one line of error, exits with 2 and writes nothing."""
    before = listing(root)
    capfd.readouterr()
    assert cli.run(argv) == 2
    lines = capfd.readouterr().err.replace("\r", "\n").strip().split("\n")
    assert lines[-1].startswith("srpo: error: ") and expected in lines[-1], lines
    assert lines[-1].isprintable() and len(lines[-1]) < 500
    assert sum("error" in line.lower() for line in lines) == 1 and "Traceback" not in "".join(lines), lines
    assert listing(root) == before, "something was written"


# what params.yaml may say (tests/test_params.py has some thirty more)
PARAMS: dict[str, tuple[Change, str]] = {
    "negative seed": (param("seed", -1), "seed: "),
    "seed too large": (param("seed", 2**31), "seed: "),
    "seed a truth value": (param("seed", True), "seed: "),
    "seed a fraction": (param("seed", 1.5), "seed: "),
    "seed a text": (param("seed", "0"), "seed: "),
    "rounds a number": (param("rounds", 5), "rounds: "),
    "rounds a list": (param("rounds", ["001"]), "rounds: "),
    "no rounds": (param("rounds", {}), "rounds: "),
    "a round null": (param("rounds/001", None), "rounds.001: "),
    "a round named base": (param("rounds/base", ROUND), "'base' is not a valid name"),
    "a round with a slash": (param("rounds", {"a/b": ROUND}), "'a/b' is not a valid name"),
    "a round with dots": (param("rounds", {"..": ROUND}), "'..' is not a valid name"),
    "a long round name": (param("rounds", {"a" * 33: ROUND}), "is not a valid name"),
    "a round named in emoji": (param("rounds", {"🎈": ROUND}), "is not a valid name"),
    "its own parent": (param("rounds/001/parent", "001"), "the parents form a cycle"),
    "overrides a list": (param("rounds/001/generate", [1]), "rounds.001.generate: "),
    "an override of another type": (param("rounds/001/train", {"steps": "9"}), "rounds.001.train.steps: "),
    "an override by number": (replaced("generate: {}", "generate: {1: 2}"), "rounds.001.generate.1"),
    "one candidate": (param("generate/candidates_per_prompt", 1), "generate.candidates_per_prompt: "),
    "too many candidates": (param("generate/candidates_per_prompt", HUGE), "generate.candidates_per_prompt: "),
    "no steps": (param("generate/num_inference_steps", 0), "generate.num_inference_steps: "),
    "guidance not a number": (param("generate/guidance_scale", float("nan")), "generate.guidance_scale: "),
    "guidance infinite": (param("generate/guidance_scale", float("inf")), "generate.guidance_scale: "),
    "odd height": (param("generate/height", 63), "generate.height: "),
    "huge width": (param("evaluate/width", 8192), "evaluate.width: "),
    "height a text": (param("generate/height", "64"), "generate.height: "),
    "endless shards": (param("generate/prompts_per_shard", HUGE), "generate.prompts_per_shard: "),
    "margin below zero": (param("select/min_margin", -0.1), "select.min_margin: "),
    "margin not a number": (param("select/min_margin", float("nan")), "select.min_margin: "),
    "margin infinite": (param("select/min_margin", float("inf")), "select.min_margin: "),
    "no learning": (param("train/learning_rate", 0), "train.learning_rate: "),
    "learning too fast": (param("train/learning_rate", 2.0), "train.learning_rate: "),
    "rank zero": (param("train/rank", 0), "train.rank: "),
    "endless training": (param("train/steps", HUGE), "train.steps: "),
    "endless warm-up": (param("train/warmup_steps", HUGE), "train.warmup_steps: "),
    "no modules": (param("train/target_modules", []), "train.target_modules: "),
    "modules a text": (param("train/target_modules", "to_q"), "train.target_modules: "),
    "unknown schedule": (param("train/lr_schedule", "linear"), "train.lr_schedule: "),
    "all captions dropped": (param("train/caption_dropout", 1.0), "train.caption_dropout: "),
    "nothing but replay": (param("train/replay", 1.0), "train.replay: "),
    "infinite decay": (param("train/weight_decay", float("inf")), "train.weight_decay: "),
    "weight zero": (param("rewards/reward/weight", 0.0), "rewards.reward.weight: "),
    "weight infinite": (param("rewards/reward/weight", float("inf")), "rewards.reward.weight: "),
    "unknown role": (param("rewards/reward/role", "referee"), "rewards.reward.role: "),
    "no kind": (param("rewards/reward/kind", ""), "rewards.reward.kind: "),
    "kind a path": (param("rewards/reward/kind", "../evil.py:Reward"), "rewards.reward.kind: "),
    "a reward with a space": (param("rewards/a b", {"kind": "clip", "role": "judge"}), "rewards.a b: "),
    "a reward named as a column": (param("rewards/seed", {"kind": "clip", "role": "judge"}), "rewards.seed: "),
    "rewards null": (param("rewards", None), "rewards: "),
    "base empty": (param("model/base", ""), "model.base: "),
    "base a number": (param("model/base", 5), "model.base: "),
    "unknown device": (param("runtime/device", "tpu"), "runtime.device: "),
    "no process": (param("runtime/processes", 0), "runtime.processes: "),
    "endless batch": (param("runtime/batch_size", HUGE), "runtime.batch_size: "),
    "tracking a number": (param("tracking/uri", 5), "tracking.uri: "),
    "no experiment": (param("tracking/experiment", ""), "tracking.experiment: "),
    "no guidance scales": (param("evaluate/guidance_scales", []), "evaluate.guidance_scales: "),
    "endless evaluation": (param("evaluate/images_per_prompt", HUGE), "evaluate.images_per_prompt: "),
    "a share above one": (param("gate/min_judge_win_rate", 1.5), "gate.min_judge_win_rate: "),
    "a limit that is no number": (param("gate/max_kid_increase", float("nan")), "gate.max_kid_increase: "),
    "a section null": (param("train", None), "train: "),
    "a section a list": (param("select", [1]), "select: "),
    "an unknown section": (param("training", {}), "training: unknown key"),
    "a key of two lines": (param("a\nb", 1), "a\\nb: unknown key"),
    "a key that steers the terminal": (param("\x1b[31mred", 1), "\\x1b[31mred: unknown key"),
    "a key without end": (param("k" * 1000, 1), "unknown key"),
    "an empty file": (content("params.yaml", ""), "must be a mapping"),
    "a list": (content("params.yaml", "- seed"), "must be a mapping"),
    "a round with no name": (content("params.yaml", "rounds: {null: {}}"), "rounds: the key None is not text"),
    "a round named by a list": (content("params.yaml", "rounds: {[1]: {}}"), "params.yaml: "),
    "another encoding": (content("params.yaml", "seed: 0".encode("utf-16")), "not UTF-8 text"),
    "a NUL": (content("params.yaml", "seed: 0\0"), "not valid YAML"),
    "a tab": (content("params.yaml", "model:\n\tbase: x"), "not valid YAML"),
    "a Python object": (content("params.yaml", "seed: !!python/object/apply:os.getcwd []"), "not valid YAML"),
    "a tag": (content("params.yaml", "seed: !evil 0"), "not valid YAML"),
    "a circle": (content("params.yaml", "seed: &a [*a]"), "params.yaml: "),
    "a circle of sections": (content("params.yaml", "rounds: &a {'001': *a}"), "params.yaml: "),
    "a bottomless list": (content("params.yaml", "seed: " + "[" * 5000), "params.yaml: "),
    "an impossible date": (content("params.yaml", "seed: 2024-99-99"), "params.yaml: "),
    "a number without end": (content("params.yaml", f"seed: {'9' * 5000}"), "params.yaml: "),
    "a folder": (lambda root: ((root / "params.yaml").unlink(), (root / "params.yaml").mkdir()), "params.yaml: "),
    "no file": (lambda root: (root / "params.yaml").unlink(), "params.yaml: no such file"),
}

# what prompt files may hold (tests/test_prompts.py has a dozen more)
PROMPTS: dict[str, tuple[Change, str]] = {
    "another encoding": (prompts(GOOD.encode("utf-16")), "not a UTF-8 text file"),
    "binary": (prompts(bytes(range(256))), "not a UTF-8 text file"),
    "a raw NUL": (prompts(b'{"id": "a", "prompt": "x\0y"}'), "train.jsonl:1: not JSON"),
    "a lone surrogate": (prompts(r'{"id": "a", "prompt": "\ud800"}'), "train.jsonl:1: prompt of 'a'"),
    "a surrogate in a tag": (prompts(r'{"id": "a", "prompt": "x", "tags": {"b": "\udfff"}}'), "train.jsonl:1: tags"),
    "ten megabytes": (prompts(GOOD, f'{{"id": "a", "prompt": "{"x" * 10_000_000}"}}'), "train.jsonl:2: prompt of 'a'"),
    "ten megabytes of no JSON": (prompts("x" * 10_000_000), "train.jsonl:1: not JSON"),
    "a bottomless list": (prompts("[" * 100_000), "train.jsonl:1: not JSON"),
    "a number without end": (prompts(f'{{"id": "a", "prompt": "x", "n": {"9" * 5000}}}'), "train.jsonl:1: not JSON"),
    "white space alone": (prompts(" \n\t\n"), "has no prompts"),
    "no prompt but a mark": (prompts("\ufeff"), "has no prompts"),
    "a no-break space": (prompts('{"id": "a", "prompt": "\u00a0"}'), "prompt of 'a' is empty"),
    "an absolute id": (prompts('{"id": "/etc/passwd", "prompt": "x"}'), "id '/etc/passwd' must be letters"),
    "an id of dots": (prompts('{"id": "..", "prompt": "x"}'), "id '..' must be letters"),
    "an id with a folder": (prompts('{"id": "a/b", "prompt": "x"}'), "id 'a/b' must be letters"),
    "an id with a drive": (prompts('{"id": "C:\\\\x", "prompt": "x"}'), "must be letters"),
    "a hidden id": (prompts('{"id": ".git", "prompt": "x"}'), "id '.git' must be letters"),
    "an id of two lines": (prompts('{"id": "a\\n", "prompt": "x"}'), r"id 'a\n' must be letters"),
    "an empty id": (prompts('{"id": "", "prompt": "x"}'), "id '' must be letters"),
    "a long id": (prompts(f'{{"id": "{"a" * 65}", "prompt": "x"}}'), "must be letters"),
    "an emoji id": (prompts('{"id": "🎈", "prompt": "x"}'), "id '🎈' must be letters"),
    "foreign digits": (prompts('{"id": "\u0661", "prompt": "x"}'), "must be letters"),
    "an id from right to left": (prompts('{"id": "\u202eabc", "prompt": "x"}'), r"id '\u202eabc' must be letters"),
    "tags a number": (prompts('{"id": "a", "prompt": "x", "tags": 0}'), "tags of 'a' must map names to texts"),
    "a tag a number": (prompts('{"id": "a", "prompt": "x", "tags": {"n": 1}}'), "tags of 'a' must map"),
    "a key that steers the terminal": (prompts('{"id": "a", "prompt": "x", "\\u001b[2J": 1}'), r"'\x1b[2J'"),
    "a held-out prompt": (prompts('{"id": "a", "prompt": "A  RED circle"}', file="eval"), "prompts.eval: 'a' has"),
    "a folder": (param("prompts/train", "data/prompts"), "data/prompts: "),
    "a path through a file": (param("prompts/train", "params.yaml/x"), "params.yaml/x: no such prompt file"),
    "a path with a NUL": (param("prompts/train", "a\0b"), r"a\x00b: "),
    "a path without end": (param("prompts/eval", "a" * 5000), "prompt file"),
}


@pytest.mark.parametrize("name", PARAMS)
def test_bad_params(name: str, world: Path, capfd: pytest.CaptureFixture) -> None:
    change, expected = PARAMS[name]
    change(world)
    refused(world, ["generate", "001"], expected, capfd)


@pytest.mark.parametrize("name", PROMPTS)
def test_bad_prompts(name: str, world: Path, capfd: pytest.CaptureFixture) -> None:
    change, expected = PROMPTS[name]
    change(world)
    refused(world, ["generate", "001"], expected, capfd)


def test_every_script_and_emoji_is_a_prompt(world: Path) -> None:
    import json

    from srpo.data.parquet import read_rows

    texts = ["مرحبا بالعالم", "שלום \u202bעולם", "👩‍👩‍👧 🎈", "a \u2028 b", "e\u0301 \t tab", "<script>"]
    prompts("\ufeff", *(json.dumps({"id": f"t{i}", "prompt": text}) for i, text in enumerate(texts)))(world)
    param("generate/candidates_per_prompt", 2)(world)
    assert cli.run(["base"]) == 0 and cli.run(["generate", "001"]) == 0
    found = [row["prompt"] for row in read_rows(world / "rounds" / "001" / "candidates", ["prompt"])]
    assert found == [text for text in texts for _ in range(2)]


# commands that are asked for what can't be
COMMANDS: dict[str, tuple[list[str], str]] = {
    "an unknown command": (["genrate", "001"], "genrate"),
    "no round": (["generate"], "ROUND"),
    "an unknown option": (["select", "001", "--fast"], "--fast"),
    "a round above the folder": (["select", "../../etc"], "rounds.../../etc: no such round"),
    "a round of no letters": (["train", ""], "rounds.: no such round"),
    "a round of two lines": (["score", "a\nb"], r"rounds.a\nb: no such round"),
    "candidates of base": (["generate", "base"], "rounds.base: no such round"),
    "scores before candidates": (["score", "001"], "rounds/001/candidates"),
    "winners before scores": (["select", "001"], "rounds/001/scores/invalid.parquet"),
    "training before winners": (["train", "001"], "rounds/001/winners"),
    "a round before its parent": (["generate", "002"], "rounds/001/adapter"),
    "an evaluation before training": (["evaluate", "001"], "rounds/001/adapter"),
    "a report before all": (["report", "001"], "rounds/001/"),
    "a table of nothing": (["table"], "no round is evaluated yet"),
    "a campaign of nothing": (["campaign"], "no round is evaluated yet"),
    "an init over a project": (["init", "."], "params.yaml: exists already"),
    "an init of no preset": (["init", "new", "--preset", "../sdxl"], "--preset: no preset '../sdxl'"),
    "an init in a file": (["init", "params.yaml"], "params.yaml"),
    "scores under a file": (
        ["score-images", "images", "--prompt", "x", "--reward", "own:Mean", "--out", "params.yaml/x/y"],
        "params.yaml is a file",
    ),
    "a reward without a name": (["score-images", "images", "--prompt", "x", "--reward", "=x"], "--reward: "),
    "a reward of no model": (["score-images", "images", "--prompt", "x", "--reward", "templates="], "--reward: "),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_can_not_be(name: str, world: Path, capfd: pytest.CaptureFixture) -> None:
    argv, expected = COMMANDS[name]
    content("images/a.png", b"")(world)
    assert cli.run(["base"]) == 0
    refused(world, argv, expected, capfd)


MEAN = """
class Mean:
    def __init__(self, model, revision, device, dtype): pass
    def score(self, images, prompts): return images.float().mean(dim=(1, 2, 3))
"""


def bomb(side: int = 60_000) -> bytes:
    """A PNG of a few bytes that says it is `side` x `side`."""
    header = struct.pack(">II5B", side, side, 8, 2, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")
    chunks = (struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
              for name, data in parts)  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


# files that score-images meets as images (tests/test_score_images.py has a dozen more)
IMAGES: dict[str, Change] = {
    "nothing": content("images/a.png", b""),
    "a text": content("images/a.png", "no image"),
    "a drawing": content("images/a.png", "<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "a bomb": content("images/a.png", bomb()),
    "a pickle": content("images/a.png", b"\x80\x04cos\nsystem\n(S'true'\ntR."),
    "a folder": lambda root: (root / "images" / "a.png").mkdir(parents=True),
    "a link to nowhere": lambda root: ((root / "images").mkdir(), (root / "images/a.png").symlink_to("nowhere")),
}


@pytest.mark.parametrize("name", IMAGES)
def test_bad_images(name: str, world: Path, capfd: pytest.CaptureFixture) -> None:
    IMAGES[name](world)
    (world / "own.py").write_text(MEAN)
    argv = ["score-images", "images", "--prompt", "x", "--reward", "own:Mean"]
    refused(world, argv, "images/a.png: not a readable image", capfd)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn campaign; read only."""
    root = tmp_path_factory.mktemp("built")
    build_campaign(root)
    return root


@pytest.fixture
def campaign(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the drawn campaign of one's own, as the current directory."""
    root = shutil.copytree(built, tmp_path / "campaign")
    monkeypatch.chdir(root)
    return root


def scores(**columns: float) -> Change:
    """Set whole columns of round 001's scores."""

    def change(root: Path) -> None:
        import polars as pl

        for name, value in columns.items():
            path = root / "rounds/001/scores/select" / f"{name}.parquet"
            pl.read_parquet(path).with_columns(pl.lit(value, pl.Float32).alias(name)).write_parquet(path)

    return change


def cut(name: str) -> Change:
    """Leave the first half of a file."""
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[: (root / name).stat().st_size // 2])


def removed(name: str) -> Change:
    return lambda root: (root / name).unlink()


SCORES = "rounds/001/scores/select/reward.parquet"
SHARD = "rounds/001/candidates/shard-00000.parquet"
LINEAGE, METRICS = "rounds/001/adapter/lineage.json", "rounds/001/evaluation/metrics.json"
SWEEP, CURVE = "rounds/base/evaluation/guidance.csv", "rounds/001/training.csv"
# a finished campaign with one file spoilt
CAMPAIGN: dict[str, tuple[list[str], Change, str]] = {
    "scores not a number": (["select", "001"], scores(reward=float("nan")), "rounds.001.select: no winner is left"),
    "scores infinite": (["select", "001"], scores(reward=float("inf")), "rounds.001.select: no winner is left"),
    "a margin no winner has": (["select", "001"], param("select/min_margin", 1e9), "rounds.001.select: no winner"),
    "scores a text": (["select", "001"], content(SCORES, "x"), f"{SCORES}: not"),
    "scores cut": (["select", "001"], cut(SCORES), f"{SCORES}: not a readable"),
    "a reward without scores": (
        ["select", "001"],
        param("rewards/other", {"kind": "own:Mean", "role": "select"}),
        "rounds/001/scores/select/other.parquet: no parquet file there",
    ),
    "candidates cut": (["select", "001"], cut(SHARD), f"{SHARD}: not a readable parquet file"),
    "a shard gone": (["select", "001"], removed(SHARD), "does not match the candidates"),
    "lineage not JSON": (["report", "001"], content(LINEAGE, "{"), f"{LINEAGE}: damaged"),
    "lineage gone": (["report", "001"], removed(LINEAGE), f"{LINEAGE}: missing"),
    "measures not JSON": (["table"], content(METRICS, b"\xff"), f"{METRICS}: damaged"),
    "measures a list": (["table"], content(METRICS, "[]"), f"{METRICS}: damaged"),
    "measures without a verdict": (["table"], content(METRICS, "{}"), f"{METRICS}: damaged"),
    "measures cut": (["campaign"], cut(METRICS), f"{METRICS}: damaged"),
    "the gate cut": (["report", "001"], cut("rounds/001/evaluation/gate.json"), "001/evaluation/gate.json: damaged"),
    "the sweep gone": (["report", "001"], removed(SWEEP), f"{SWEEP}: missing"),
    "the sweep no numbers": (["report", "001"], content(SWEEP, "guidance,fid\n1.0,x\n"), f"{SWEEP}: damaged"),
    "the sweep without guidance": (["campaign"], content(SWEEP, "fid\n1.0\n"), f"{SWEEP}: damaged"),
    "samples cut": (["report", "001"], cut("rounds/001/evaluation/samples.parquet"), "samples.parquet: not a readable"),
    "the curve gone": (["report", "001"], removed(CURVE), f"{CURVE}: missing"),
    "the curve empty": (["report", "001"], content(CURVE, ""), f"{CURVE}: damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", CAMPAIGN)
def test_a_campaign_with_a_file_spoilt(name: str, campaign: Path, capfd: pytest.CaptureFixture) -> None:
    argv, change, expected = CAMPAIGN[name]
    change(campaign)
    refused(campaign, argv, expected, capfd)


def own_reward(score: str = "return images.float().mean(dim=(1, 2, 3))", head: str = "", start: str = "pass") -> str:
    return (
        f"{head}\nclass Mean:\n    def __init__(self, model, revision, device, dtype): {start}\n"
        f"    def score(self, images, prompts): {score}\n"
    )


REWARDS: dict[str, tuple[str, str]] = {
    "raises": (own_reward("raise ValueError('two\\nlines')"), "score raised ValueError: two lines"),
    "exits": (own_reward("raise SystemExit(0)"), "score raised SystemExit"),
    "exits when imported": (own_reward(head="raise SystemExit(0)"), "loading raised SystemExit"),
    "raises when made": (own_reward(start="1 / 0"), "loading raised ZeroDivisionError"),
    "raises when imported": (own_reward(head="1 / 0"), "loading raised ZeroDivisionError"),
    "is not Python": (own_reward(head="def"), "can't be imported"),
    "lacks the class": ("", "has no attribute 'Mean'"),
    "is no class": ("Mean = 5", "loading raised TypeError"),
    "can't score": ("class Mean:\n    def __init__(self, *a): pass", "score raised AttributeError"),
    "gives a list": (own_reward("return [0.0] * len(images)"), "score returned list"),
    "gives too few": (own_reward("return images[1:, 0, 0, 0].float()"), "must return a float32 tensor"),
    "gives one": (own_reward("return images.float().mean()"), "must return a float32 tensor"),
    "gives a matrix": (own_reward("return images.float().mean(dim=(2, 3))"), "must return a float32 tensor"),
    "gives complex numbers": (own_reward("return images[:, 0, 0, 0] * 1j"), "must return a float32 tensor"),
}


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_of_ones_own_that(name: str, campaign: Path, capfd: pytest.CaptureFixture) -> None:
    code, expected = REWARDS[name]
    module = f"own_{list(REWARDS).index(name)}"
    content(f"{module}.py", code)(campaign)
    for reward, role in (("reward", "select"), ("judge", "judge"), ("accuracy", "judge")):
        param(f"rewards/{reward}", {"kind": f"{module}:Mean", "role": role})(campaign)
    refused(campaign, ["score", "001"], expected, capfd)
    refused(campaign, ["score", "001"], "rewards.reward: ", capfd)
