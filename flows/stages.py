"""A DVC stage as a Prefect task, which is retried unless its input is bad."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from prefect import Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.states import Completed, State

from flows import concurrency, git_sync, progress
from flows.errors import BadInput, StageDied
from flows.process import ignore_state, run_group, stopping
from srpo.errors import UserError
from srpo.rounds import RoundFiles
from srpo.runtime import fork_server

ROUND_STAGES = ("generate", "score", "select", "train", "evaluate", "gate", "report")
BASE_STAGES = ("base", "evaluate-base")
GPU_STAGES = ("evaluate-base", "generate", "score", "train", "evaluate")
BAD_INPUT = 2
CACHED = "Cached"  # name of the state of a stage that DVC skipped
# DVC's messages for a missing dependency: of stages that it can cache, and of others
MISSING = re.compile(r"No such file or directory: '(.+)'|dependency '(.+)' does not exist")
RETRIES = 2
RETRY_DELAYS = [float(os.environ.get("SRPO_RETRY_DELAY", "10")) * factor for factor in (1, 4)]


def _may_retry(_task: Task, _run: TaskRun, state: State) -> bool:
    return not stopping.is_set() and not isinstance(state.result(raise_on_failure=False), BadInput)


@task(
    task_run_name="{stage}",
    cache_policy=NO_CACHE,
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=_may_retry,
)
def reproduce(stage: str, force: bool = False, push: bool = False) -> State[str] | str:
    """Reproduce one DVC stage, holding a slot of the limit `gpu` if it uses a GPU.

    Args:
        stage: as DVC names it, `train@001`.
        force: run it even if nothing changed.
        push: before it runs, `dvc pull` its inputs; afterwards, `dvc push` its outputs and push its entry of dvc.lock.

    Returns:
        `ran`, or the state Cached if DVC found nothing to do.

    Raises:
        BadInput: the stage exited with status 2, or DVC did not start it.
        StageDied: any other failure.
        Stopped: the flow is being stopped.
    """
    tracker = progress.current.get()
    tracker.update(stage)
    done = False
    try:
        ran = _bring_up_to_date(stage, force, push, tracker)
        if push:
            _push(stage)
        done = True
    finally:
        tracker.end(stage, done)
    return "ran" if ran else Completed(name=CACHED, message="DVC: nothing changed", data="cached")


def _bring_up_to_date(stage: str, force: bool, push: bool, tracker: progress.Progress) -> bool:
    if push and not force and _is_recorded(stage):
        return False
    if push and (paths := git_sync.inputs(stage)):
        code, lines = dvc("pull", *paths)
        if code != 0:
            raise _pull_failure(stage, code, lines)
    with concurrency.slot(get_run_logger()) if stage.partition("@")[0] in GPU_STAGES else contextlib.nullcontext():
        # `dvc repro` would sample pruned candidates again
        options = ["--force"] if force else ["--allow-missing"] if _is_pruned(stage) else []
        code, lines = dvc(
            "repro", "--single-item", *options, stage, on_state=lambda state: tracker.update(stage, state)
        )
    if code != 0:
        raise _failure(stage, code, lines)
    return _unchanged(stage) not in lines


def _is_pruned(stage: str) -> bool:
    """Return whether the stage is of a decided round without its candidates, as `srpo prune` leaves it."""
    key = stage.partition("@")[2]
    files = RoundFiles(Path(), key)
    return bool(key) and (files.evaluation / "gate.json").exists() and not files.candidates.exists()


def _is_recorded(stage: str) -> bool:
    """Return whether dvc.lock has this stage with the current params and inputs, wherever its files are."""
    code, lines = dvc("repro", "--single-item", "--allow-missing", "--dry", stage, quiet=True)
    return code == 0 and _unchanged(stage) in lines


def _unchanged(stage: str) -> str:
    return f"Stage '{stage}' didn't change, skipping"


def _push(stage: str) -> None:
    code, lines = dvc("push", stage)
    if code != 0:
        raise StageDied(f"push of {stage}: {last_error(lines, code)}")
    if git_sync.upstream() is None:
        get_run_logger().info("dvc.lock is not pushed: this folder's Git branch has no upstream")
        return
    try:
        if git_sync.push_lock_entry(stage):
            get_run_logger().info("Pushed the entry of %s in dvc.lock", stage)
    except UserError as error:  # a network that is down may come back
        raise StageDied(str(error)) from None


def dvc(
    command: str, *arguments: str, on_state: Callable[[str], None] = ignore_state, quiet: bool = False
) -> tuple[int, list[str]]:
    """Run a `dvc` command that waits for DVC's locks.

    Args:
        command: such as `repro`.
        arguments: its arguments.
        on_state: called with the text of progress bars.
        quiet: log its lines as debug instead of info.

    Returns:
        Exit code and last lines.
    """
    module = ["srpo.runtime.fork_server", "dvc"] if fork_server.SOCKET_VARIABLE in os.environ else ["dvc"]
    log = get_run_logger()
    process = [sys.executable, "-m", *module, "--wait-for-lock", command, *arguments]
    return run_group(process, log.debug if quiet else log.info, on_state)


def _pull_failure(stage: str, code: int, lines: list[str]) -> BadInput | StageDied:
    text = "\n".join(lines)
    if "Checkout failed for following targets" in text or "No such file or directory" in text:
        missing = git_sync.inputs(stage)
        return BadInput(
            f"{stage}: not all of its inputs ({', '.join(missing)}) are in the remote; run their stages first"
        )
    return StageDied(f"pull for {stage}: {last_error(lines, code)}")


def _failure(stage: str, code: int, lines: list[str]) -> BadInput | StageDied:
    text = "\n".join(lines)
    exited = re.findall(r"failed to run: .*, exited with (-?\d+)$", text, re.MULTILINE)
    if exited and int(exited[-1]) == BAD_INPUT:
        own = re.findall(r"srpo: error: (.*)", text)
        return BadInput(own[-1] if own else f"{stage}: bad input")
    message = last_error(lines, code)
    # dvc's own statuses are 251 to 255; before a stage starts they mean a missing dependency or a broken file
    if code >= 251 and not any(line.startswith("Running stage ") for line in lines):
        if missing := MISSING.search(message):
            path = (missing[1] or missing[2]).removeprefix(f"{Path.cwd()}/")
            message = f"{path} does not exist; `dvc pull` fetches files under DVC"
            if path.endswith("/candidates"):
                message += ", and --force samples pruned candidates again"
        return BadInput(f"{stage}: {message}")
    return StageDied(f"{stage}: {message}")


def last_error(lines: list[str], code: int) -> str:
    """Return the error message among the last lines of a `dvc` command."""
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or [f"exit status {code}"])[-1]
