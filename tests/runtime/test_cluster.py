"""A real Ray cluster of several nodes on loopback: the same bytes, whatever ends on the way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest

from srpo.config.loader import Params, load_params
from srpo.errors import UserError
from srpo.rounds import Round, RoundFiles
from srpo.runtime.make_units import make_units
from srpo.runtime.units import unfinished
from tests.support.units import sleepers

pytest.importorskip("ray")
REPO = Path(__file__).parents[2]
ADDRESS = "127.0.0.2"  # Ray replaces 127.0.0.1 by the host's own address


class Nodes:
    """A cluster of a head with one CPU, and the nodes that are added."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        options = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 * 2**20}
        self.cluster = Cluster(initialize_head=True, head_node_args=options | {"node_ip_address": ADDRESS})
        self.address = self.cluster.address

    def add(self, cpus: int = 1) -> object:
        return self.cluster.add_node(num_cpus=cpus, node_ip_address=ADDRESS, object_store_memory=100 * 2**20)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PYTHONPATH", str(REPO))
        found = Nodes()
        found.add()
        yield found
        found.cluster.shutdown()


def with_cluster(params: Params, address: str | None, **options: object) -> Params:
    runtime = params.runtime.model_copy(update={"cluster": address, **options})
    return params.model_copy(update={"runtime": runtime})


@pytest.fixture
def round(world: Path, nodes: Nodes) -> Round:
    return Round.of(with_cluster(load_params(), nodes.address), world, "001")


def journal(path: Path) -> list[tuple[str, str]]:
    return [(name, pid) for name, pid in (line.split() for line in path.read_text().splitlines())]


@pytest.mark.parametrize("storage", ["copy", pytest.param("shared", marks=pytest.mark.slow)])
def test_nodes_share_units(round: Round, tmp_path: Path, storage: str) -> None:
    params = round.params.runtime.cluster
    round = Round.of(with_cluster(load_params(), params, cluster_storage=storage), round.root, "001")
    units = sleepers(round, 6, 0.3, tmp_path / "journal")
    units.paths[2].write_text("kept")
    make_units(units)
    made = journal(tmp_path / "journal")
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
    with after(lambda: lines.exists() and len(journal(lines)) >= 3, lambda: kill(journal(lines)[-1][1])):
        make_units(units)
    counts = Counter(name for name, _ in journal(lines))
    assert sum(counts.values()) == 7 and not unfinished(units.paths), counts
    assert "another one makes it" in caplog.text


@pytest.mark.slow
def test_a_poisonous_unit_is_given_up(round: Round, tmp_path: Path) -> None:
    units = sleepers(round, 1, 60, tmp_path / "journal")
    killed: set[str] = set()

    def kill_all() -> bool:
        pids = {pid for _, pid in journal(tmp_path / "journal")} if (tmp_path / "journal").exists() else set()
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
    wait_for(lambda: lines.exists() and len({pid for _, pid in journal(lines)}) == 3)
    nodes.cluster.remove_node(early, allow_graceful=False)
    late = nodes.add()
    _, told = driver.communicate(timeout=300)
    nodes.cluster.remove_node(late)
    assert driver.returncode == 0, told
    made = journal(lines)
    assert len({name for name, _ in made}) == 24 and len(made) <= 25, "at most one unit was made again"
    assert len({pid for _, pid in made}) == 4, "the late node made units, too"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
@pytest.mark.parametrize("cluster", ["local", None])
def test_nothing_outlives_the_driver(
    round: Round, nodes: Nodes, tmp_path: Path, number: signal.Signals, code: int, cluster: str | None
) -> None:
    lines = tmp_path / "journal"
    driver = start(round.root, cluster or nodes.address, lines, 8, 60)
    wait_for(lambda: lines.exists() and len(journal(lines)) >= 2)
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
    round: Round, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from srpo.runtime import gang
    from srpo.stages.train import train

    monkeypatch.setattr(gang, "POLL_SECONDS", 0.1)
    params, files = prepared(round.root, steps=60, learning_rate=1e-4)
    params = with_cluster(params, round.params.runtime.cluster, processes=2, checkpoint_every=5)
    states = partial(round.root.glob, ".srpo/scratch/train@001-*/state-*.safetensors")
    steps: list[int] = []

    def kill_one() -> None:
        members = [process for process in psutil.process_iter(["cmdline"]) if "ray::Member" in str(process.info)]
        members[0].kill()

    with after(lambda: list(states()), kill_one):
        train(Round.of(params, round.root, "001"), lambda _, step: steps.append(step))
    assert "restarting all" in caplog.text
    assert len(losses(files)) == 60 and steps.count(1) == 2 and steps.count(60) == 1


@pytest.mark.slow
def test_other_versions_are_refused(
    round: Round, nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "old" / "diffusers-0.1.dist-info" / "METADATA"
    record.parent.mkdir(parents=True)
    record.write_text("Metadata-Version: 2.1\nName: diffusers\nVersion: 0.1\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'old'}:{REPO}")
    other = nodes.add()
    try:
        with pytest.raises(UserError, match=f"machine {ADDRESS} has diffusers 0.1 .here "):
            make_units(sleepers(round, 2, 0, tmp_path / "journal"))
    finally:
        nodes.cluster.remove_node(other)
    assert not (tmp_path / "journal").exists()


@pytest.mark.parametrize(
    ("address", "message"),
    [("127.0.0.2:1", "no answer from 127.0.0.2:1"), ("ray://nowhere.invalid:10001", "no answer from nowhere.invalid")],
)
def test_no_cluster_is_one_line(world: Path, tmp_path: Path, address: str, message: str) -> None:
    round = Round.of(with_cluster(load_params(), address), world, "001")
    with pytest.raises(UserError, match=f"^runtime.cluster: {address}: {message}.*is `ray start` running"):
        make_units(sleepers(round, 1, 0, tmp_path / "journal"))


@contextmanager
def after(condition: Callable[[], object], action: Callable[[], object]) -> Iterator[None]:
    """Do something in a thread once a condition holds, while the block runs."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            if condition():
                action()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def kill(pid: str) -> None:
    os.kill(int(pid), signal.SIGKILL)
