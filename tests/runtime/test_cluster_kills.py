"""Thirty kills of processes, nodes and drivers of a cluster: the same bytes, nothing lost, one unit again for each."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from srpo.config.loader import load_params
from srpo.rounds import Round
from tests.support.cluster import REPO, Nodes, journal, wait_for
from tests.support.world import write_prompts

CPUS_OF_A_NODE = 2
PROCESSES = 1 + CPUS_OF_A_NODE  # the head has one
# of a killed node or driver every process loses the unit that it was making
LOST = {"process": 1, "node": CPUS_OF_A_NODE, "driver": PROCESSES}
COMMANDS = {"generate": "001", "score": "001", "evaluate": "base"}
OUTPUTS = {"generate": "001/candidates", "score": "001/scores", "evaluate": "base/evaluation"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thirty_kills_lose_nothing(world: Path, nodes: Nodes, tmp_path: Path) -> None:
    wanted = in_one_process(world)
    params = world / "params.yaml"
    params.write_text(params.read_text().replace("runtime:\n", f"runtime:\n  cluster: {nodes.address}\n"))
    chance = random.Random(0)
    kills = ["process", "node", "driver"] * 10
    chance.shuffle(kills)
    killer = Killer(world, nodes, tmp_path, chance)
    for number, stage in enumerate(COMMANDS):
        left = kills[10 * number : 10 * (number + 1)]
        while left:
            shutil.rmtree(world / "rounds" / OUTPUTS[stage])
            killer.run(stage, left)
            assert content(world / "rounds" / OUTPUTS[stage]) == wanted[stage]
    wait_for(lambda: not nodes.processes("UnitMaker"))


class Killer:
    """Runs a stage, and kills meanwhile."""

    def __init__(self, root: Path, nodes: Nodes, folder: Path, chance: random.Random) -> None:
        self._root, self._nodes, self._chance = root, nodes, chance
        self._journal, self._log = folder / "journal", folder / "log"
        (self._spot,) = nodes.cluster.worker_nodes
        self._replace_node()

    def run(self, stage: str, kills: list[str]) -> None:
        """Run a stage to its end; remove from `kills` those that came before it, and check what was made again."""
        self._journal.write_text("")
        driver, may_lose, came = self._start(stage), 0, []
        while kills and self._moment(driver):
            kind = kills[0]
            if kind == "driver":
                driver.kill()
                driver.wait()
                driver = self._start(stage)
            elif kind == "node":
                self._replace_node()
            elif not self._kill_process():
                continue
            may_lose += LOST[kind]
            came.append(kills.pop(0))
        assert driver.wait() == 0, self._log.read_text()
        begun = [name for name, _ in journal(self._journal)]
        again = len(begun) - len(set(begun))
        print(f"{stage}: {came}: {len(set(begun))} units, {again} made again")
        assert again <= may_lose, f"{came}: {again} units were made again"

    def _start(self, stage: str) -> subprocess.Popen:
        command = ["-m", "tests.support.journaled", str(self._journal), stage, COMMANDS[stage]]
        with self._log.open("w") as log:
            environ = os.environ | {"PYTHONPATH": str(REPO)}
            return subprocess.Popen([sys.executable, *command], cwd=self._root, env=environ, stderr=log)

    def _moment(self, driver: subprocess.Popen) -> bool:
        """Wait for a moment to kill; return whether the driver still runs."""
        units = len(journal(self._journal)) + self._chance.randint(0, 4)
        end = time.monotonic() + 60  # no unit begins after the last one
        while driver.poll() is None and len(journal(self._journal)) < units and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(self._chance.random())
        return driver.poll() is None

    def _replace_node(self) -> None:
        self._nodes.kill(self._spot)
        self._spot = self._nodes.add(CPUS_OF_A_NODE)

    def _kill_process(self) -> bool:
        processes = self._nodes.processes("UnitMaker")
        if processes:
            self._chance.choice(processes).kill()
        return bool(processes)


def in_one_process(root: Path) -> dict[str, dict[str, bytes]]:
    """Make base and all that the stages write, with more units than `tests.support.world` has; return the latter."""
    from srpo.stages.base import pin_base
    from srpo.stages.evaluate import evaluate
    from srpo.stages.generate import generate
    from srpo.stages.score import score

    write_prompts(root / "data" / "prompts" / "train.jsonl", [f"{n} red circle" for n in range(30)], "train")
    params = root / "params.yaml"
    text = params.read_text().replace("prompts_per_shard: 2", "prompts_per_shard: 1")
    text = re.sub(r"  accuracy: .*\n", "", text)  # knows no other prompts
    scales = [1 + n / 10 for n in range(20)]
    params.write_text(re.sub(r"guidance_scales: .*", f"guidance_scales: {scales}", text))
    base, first = (Round.of(load_params(), root, key) for key in ("base", "001"))
    pin_base(base)
    evaluate(base)
    generate(first)
    score(first)
    return {stage: content(root / "rounds" / folder) for stage, folder in OUTPUTS.items()}


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
