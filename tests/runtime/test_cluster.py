"""A real Ray cluster of several nodes on loopback: the same bytes, whatever ends on the way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import psutil
import pytest

from srpo.config.loader import Params, load_params
from srpo.errors import UserError
from srpo.rounds import Round, RoundFiles
from srpo.runtime.make_units import make_units
from srpo.runtime.units import unfinished
from tests.support.cluster import ADDRESS, REPO, Nodes, after, journal, kill, wait_for, with_cluster
from tests.support.hub import add_model
from tests.support.units import sleepers

pytest.importorskip("ray")


@pytest.fixture
def round(world: Path, nodes: Nodes) -> Round:
    return Round.of(with_cluster(load_params(), nodes.address), world, "001")


@pytest.fixture
def client_address(nodes: Nodes) -> str:
    if nodes.client_address is None:
        pytest.skip("ray[client] is not installed")
    return nodes.client_address


@pytest.mark.parametrize("storage", ["copy", pytest.param("shared", marks=pytest.mark.slow)])
def test_nodes_share_units(round: Round, tmp_path: Path, storage: str) -> None:
    params = with_cluster(load_params(), round.params.runtime.cluster, cluster_storage=storage)
    check_shared(Round.of(params, round.root, "001"), tmp_path / "journal")


@pytest.mark.slow
def test_a_client_shares_units(round: Round, client_address: str, tmp_path: Path) -> None:
    params = with_cluster(load_params(), client_address)
    check_shared(Round.of(params, round.root, "001"), tmp_path / "journal")


def check_shared(round: Round, lines: Path) -> None:
    units = sleepers(round, 6, 0, lines, processes=2)
    units.paths[2].write_text("kept")
    make_units(units)
    made = journal(lines)
    assert sorted(name for name, _ in made) == [f"unit-{n}" for n in (0, 1, 3, 4, 5)], "each once"
    assert len({pid for _, pid in made}) == 2
    wanted = (round.root / "params.yaml").read_bytes()
    assert units.paths[2].read_text() == "kept"
    assert units.paths[4].read_bytes() == b"input of 4" + wanted
    assert [path.name for path in units.paths[0].parent.iterdir() if path not in units.paths] == []


@pytest.mark.slow
def test_bad_input_names_the_node(round: Round, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^input-1.txt: bad .on machine {ADDRESS}.$"):
        make_units(sleepers(round, 3, 0, tmp_path / "journal", bad=1))


@pytest.mark.slow
def test_a_model_that_a_node_lacks(round: Round, nodes: Nodes, tmp_path: Path) -> None:
    # in the Hub's cache of the driver's home, and not in that of the nodes
    add_model(tmp_path / "hub", "someone/judge", "a" * 40, round.root / "data" / "judge")
    params = round.root / "params.yaml"
    text = params.read_text().replace("model: data/judge", f"model: someone/judge, revision: {'a' * 40}")
    params.write_text(text.replace("runtime:\n", f"runtime:\n  cluster: {nodes.address}\n"))
    environ = os.environ | {"PYTHONPATH": str(REPO), "HF_HOME": str(tmp_path)}
    for argv, status in ((["base"], 0), (["evaluate", "base"], 2)):
        command = [sys.executable, "-m", "srpo", *argv]
        ended = subprocess.run(command, env=environ, capture_output=True, text=True)
        assert ended.returncode == status, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("srpo: error:")]
    assert "someone/judge" in line and line.endswith(f"(on machine {ADDRESS})")
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_stages_write_the_same_bytes(round: Round, monkeypatch: pytest.MonkeyPatch) -> None:
    from srpo.stages.base import pin_base
    from srpo.stages.evaluate import evaluate
    from srpo.stages.generate import generate
    from srpo.stages.score import score

    root = round.root
    found = []
    for params in (load_params(), round.params):
        base, first = (Round.of(params, root, key) for key in ("base", "001"))
        pin_base(base)
        evaluate(base)
        generate(first)
        score(first)
        found.append(content(root / "rounds"))
        shutil.rmtree(root / "rounds")
    assert [name for name, data in found[0].items() if found[1].get(name) != data] == []
    assert found[0].keys() == found[1].keys()
    assert {"base/evaluation/features.safetensors", "001/scores/judge/judge.parquet"} < found[0].keys()


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_killed_process_loses_one_unit(round: Round, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = tmp_path / "journal"
    units = sleepers(round, 6, 0.5, lines)
    with after(lambda: len(journal(lines)) >= 3, lambda: kill(journal(lines)[-1][1])):
        make_units(units)
    counts = Counter(name for name, _ in journal(lines))
    assert sum(counts.values()) == 7 and not unfinished(units.paths), counts
    assert "another one makes it" in caplog.text


@pytest.mark.slow
def test_a_poisonous_unit_is_given_up(round: Round, tmp_path: Path) -> None:
    units = sleepers(round, 1, 60, tmp_path / "journal")
    killed: set[str] = set()

    def kill_all() -> bool:
        pids = {pid for _, pid in journal(tmp_path / "journal")}
        for pid in pids - killed:
            kill(pid)
            killed.add(pid)
        return len(killed) == 3

    with after(kill_all, lambda: None), pytest.raises(SystemExit):
        make_units(units)


@pytest.mark.slow
def test_nodes_come_and_go(round: Round, nodes: Nodes, tmp_path: Path) -> None:
    lines = tmp_path / "journal"
    early = nodes.add()
    driver = start(round.root, nodes.address, lines, 24, 2)
    wait_for(lambda: len({pid for _, pid in journal(lines)}) == 3)
    nodes.kill(early)
    late = nodes.add()
    _, told = driver.communicate(timeout=300)
    nodes.cluster.remove_node(late)
    assert driver.returncode == 0, told
    made = journal(lines)
    assert len({name for name, _ in made}) == 24 and len(made) <= 25, "at most one unit was made again"
    assert len({pid for _, pid in made}) == 4, "the late node made units, too"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
@pytest.mark.parametrize("cluster", ["local", "nodes", "client"])
def test_nothing_outlives_the_driver(
    round: Round,
    nodes: Nodes,
    tmp_path: Path,
    number: signal.Signals,
    code: int,
    cluster: str,
    request: pytest.FixtureRequest,
) -> None:
    lines = tmp_path / "journal"
    address = {"local": "local", "nodes": nodes.address}.get(cluster) or request.getfixturevalue("client_address")
    driver = start(round.root, address, lines, 8, 60)
    wait_for(lambda: len(journal(lines)) >= 2)
    processes = [psutil.Process(int(pid)) for _, pid in journal(lines)]
    processes += psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(number)
    _, told = driver.communicate(timeout=60)
    assert driver.returncode == code, told
    assert not psutil.wait_procs(processes, timeout=120)[1]


def start(root: Path, cluster: str, lines: Path, count: int, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.support.units", cluster, str(lines), str(count), str(seconds)]
    environ = os.environ | {"PYTHONPATH": str(REPO)}
    return subprocess.Popen(command, cwd=root, env=environ, stderr=subprocess.PIPE, text=True)


def prepared(root: Path, **options: object) -> tuple[Params, RoundFiles]:
    """Make winners of round 001; return params with these options of train."""
    from srpo.stages.base import pin_base
    from srpo.stages.generate import generate
    from srpo.stages.score import score
    from srpo.stages.select import select

    params = load_params()
    params = params.model_copy(update={"train": params.train.model_copy(update=options)})
    pin_base(Round.of(params, root, "base"))
    for stage in (generate, score, select):
        stage(Round.of(params, root, "001"))
    return params, RoundFiles(root, "001")


def losses(files: RoundFiles) -> list[float]:
    return [float(line.split(",")[1]) for line in files.training.read_text().splitlines()[1:]]


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["copy", "shared"])
def test_nodes_train_together(round: Round, storage: str) -> None:
    from srpo.stages.train import train

    params, files = prepared(round.root, steps=4)
    train(Round.of(params, round.root, "001"))
    alone, steps = losses(files), []
    shutil.rmtree(files.adapter)
    params = with_cluster(params, round.params.runtime.cluster, cluster_storage=storage, processes=2)
    train(Round.of(params, round.root, "001"), lambda metrics, step: steps.append((step, metrics["loss"])))
    assert losses(files) == pytest.approx(alone, rel=1e-4)
    assert steps == list(enumerate(losses(files), 1))
    assert sorted(path.name for path in files.adapter.iterdir()) == ["lineage.json", "pytorch_lora_weights.safetensors"]
    assert not list((round.root / ".srpo" / "scratch").glob("train*"))


@pytest.mark.slow
def test_a_killed_training_resumes(
    round: Round, nodes: Nodes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from srpo.runtime import gang
    from srpo.stages.train import train

    monkeypatch.setattr(gang, "POLL_SECONDS", 0.1)
    params, files = prepared(round.root, steps=60, learning_rate=1e-4)
    params = with_cluster(params, round.params.runtime.cluster, processes=2, checkpoint_every=5)
    states = partial(round.root.glob, ".srpo/scratch/train@001-*/state-*.safetensors")
    steps: list[int] = []

    with after(lambda: list(states()), lambda: nodes.processes("Member")[0].kill()):
        train(Round.of(params, round.root, "001"), lambda _, step: steps.append(step))
    assert "restarting all" in caplog.text
    assert len(losses(files)) == 60 and steps.count(1) == 2 and steps.count(60) == 1


@pytest.fixture
def other_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that start now have another version of diffusers."""
    record = tmp_path / "old" / "diffusers-0.1.dist-info" / "METADATA"
    record.parent.mkdir(parents=True)
    record.write_text("Metadata-Version: 2.1\nName: diffusers\nVersion: 0.1\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'old'}:{REPO}")


@pytest.mark.slow
@pytest.mark.usefixtures("other_version")
def test_other_versions_are_refused(round: Round, nodes: Nodes, tmp_path: Path) -> None:
    other = nodes.add()
    try:
        with pytest.raises(UserError, match=f"machine {ADDRESS} has diffusers 0.1 .here "):
            make_units(sleepers(round, 2, 0, tmp_path / "journal"))
    finally:
        nodes.cluster.remove_node(other)
    assert not (tmp_path / "journal").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("other_version")
def test_a_late_node_of_another_version(round: Round, nodes: Nodes, tmp_path: Path) -> None:
    lines = tmp_path / "journal"
    driver = start(round.root, nodes.address, lines, 8, 60)
    wait_for(lambda: len(journal(lines)) == 2)
    other = nodes.add()
    _, told = driver.communicate(timeout=120)
    nodes.cluster.remove_node(other)
    assert driver.returncode == 2
    assert f"machine {ADDRESS} has diffusers 0.1 (here " in told
    assert len(journal(lines)) == 2


@pytest.mark.parametrize(
    ("address", "message"),
    [("127.0.0.2:1", "no answer from 127.0.0.2:1"), ("ray://nowhere.invalid:10001", "no answer from nowhere.invalid")],
)
def test_no_cluster_is_one_line(world: Path, tmp_path: Path, address: str, message: str) -> None:
    round = Round.of(with_cluster(load_params(), address), world, "001")
    with pytest.raises(UserError, match=f"^runtime.cluster: {address}: {message}.*is `ray start` running"):
        make_units(sleepers(round, 1, 0, tmp_path / "journal"))
