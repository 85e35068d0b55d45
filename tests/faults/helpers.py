"""A project with every stage of one round done, and its commands as forked processes that can be killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import shutil
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

# forked from a clean process that has the imports: this one may have threads, and no thread survives a fork
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.faults.preload"])
STAGES = ("generate", "score", "select", "train", "evaluate", "gate", "report")
EVALUATION = ("per_prompt.parquet", "samples.parquet", "drift.json", "guidance.csv")
OUTPUTS = {
    "base": ["base/adapter", "base/rewards.json", "base/selecting.json", "base/preview.json"],
    "generate": ["001/candidates"],
    "score": ["001/scores/select", "001/scores/judge", "001/scores/invalid.parquet"],
    "select": ["001/winners"],
    "train": ["001/adapter", "001/training.csv"],
    "evaluate": [f"001/evaluation/{name}" for name in EVALUATION],
    "gate": ["001/evaluation/gate.json", "001/evaluation/metrics.json"],
    "report": ["001/report"],
}


def start(root: Path, *argv: str, log: Path | None = None, tool: str = "srpo") -> BaseProcess:
    """`srpo <argv>` (or `dvc <argv>`) in a forked process in `root`; what it prints goes to `log`."""
    process = SERVER.Process(target=run_command, args=(root, tool, argv, log))
    process.start()
    return process


def run_command(root: Path, tool: str, argv: tuple[str, ...], log: Path | None) -> None:
    """Be that command, in a process of its own. Does not return."""
    import torch

    from srpo.runtime import fork_server

    os.chdir(root)
    torch.set_num_threads(1)
    with open(log or os.devnull, "w") as out:  # noqa: PTH123
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    raise SystemExit(fork_server.run_inline([tool, *argv]))


def make_world(root: Path) -> None:
    """`tests.world.build_world`, in a forked process."""
    process = SERVER.Process(target=_make_world, args=(root,))
    process.start()
    process.join()
    assert process.exitcode == 0


def _make_world(root: Path) -> None:
    from tests.support.world import build_world

    build_world(root)


def take_away(root: Path, stage: str) -> None:
    """Remove a stage's outputs, as DVC does before it runs the stage."""
    for name in OUTPUTS[stage]:
        path = root / "rounds" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def run(root: Path, *argv: str) -> tuple[int, str]:
    """Its exit code and what it printed."""
    log = root / ".log"
    process = start(root, *argv, log=log)
    process.join()
    return process.exitcode, log.read_text()


def command_of(stage: str) -> list[str]:
    """The command that makes the outputs of a stage."""
    return ["base"] if stage == "base" else [stage, "001"]


def build(root: Path) -> Path:
    """All of base and of round 001, in a project of `tests.world`; every command must succeed."""
    params = root / "params.yaml"
    # a state at every step, and a tracking server that answers at once that it is not there
    text = params.read_text().replace("runtime:\n", "runtime:\n  checkpoint_every: 1\n")
    text = text.replace("steps: 3\n", "steps: 6\n").replace("prompts_per_shard: 2", "prompts_per_shard: 1")
    params.write_text(re.sub(r"uri: sqlite.*", "uri: nowhere://", text))
    for argv in (["base"], ["evaluate", "base"], *([stage, "001"] for stage in STAGES)):
        code, told = run(root, *argv)
        assert code == 0, f"{argv}: {told}"
    return root


def contents(root: Path, stage: str) -> dict[str, bytes]:
    """What a stage published, file by file."""
    found = {}
    for name in OUTPUTS[stage]:
        path = root / "rounds" / name
        files = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
        found |= {str(file.relative_to(root)): file.read_bytes() for file in files}
    return found


def oddities(root: Path) -> list[str]:
    """Files under rounds/ that no finished stage leaves there."""
    found = (root / "rounds").rglob("*")
    return [str(path.relative_to(root)) for path in found if path.name.startswith(".") or "partial" in path.name]


@contextlib.contextmanager
def ended(process: BaseProcess) -> Iterator[BaseProcess]:
    """Kill the process at the end of the block, if it still runs."""
    try:
        yield process
    finally:
        process.kill()
        process.join()


def wait_for(condition, process: BaseProcess | None = None, seconds: float = 60) -> bool:
    """Whether the condition came true before time was up and the process ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if process is not None and not process.is_alive():
            return bool(condition())
        time.sleep(0.002)
    return False
