"""A DVC stage as a Prefect task: retried when it dies, not when it refuses its input."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State

from flows import concurrency, git_sync, progress
from flows.errors import BadInput, StageDied
from flows.process import run_group, stopping
from srpo.errors import UserError

ROUND_STAGES = ("generate", "score", "select", "train", "evaluate", "report")
BASE_STAGES = ("base", "evaluate-base")
GPU_STAGES = ("evaluate-base", "generate", "score", "train", "evaluate")
BAD_INPUT = 2
# DVC says the first of a stage that it can cache, the second of any other
MISSING = re.compile(r"No such file or directory: '(.+)'|dependency '(.+)' does not exist")
RETRIES = 2
RETRY_DELAYS = [float(os.environ.get("SRPO_RETRY_DELAY", "10")) * factor for factor in (1, 4)]


def _may_retry(_task, _run, state) -> bool:
    return not stopping.is_set() and not isinstance(state.result(raise_on_failure=False), BadInput)


@task(
    task_run_name="{stage}",
    cache_policy=NO_CACHE,
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=_may_retry,
)
def reproduce(stage: str, force: bool = False, push: bool = False) -> State[str] | str:
    """Reproduce one DVC stage, holding a slot of the limit `gpu` if it uses one.

    Args:
        push: first `dvc pull` what the stage needs, unless it is up to date; then `dvc push` its outputs and publish
            its entry of dvc.lock.

    Returns:
        `ran`, or the state Cached when DVC found nothing to do.

    Raises:
        BadInput: the stage exited with status 2, or DVC did not even start it.
        StageDied: anything else went wrong.
        Stopped: the flow is being ended.
    """
    shown = progress.current.get()
    shown.see(stage)
    done = False
    try:
        ran = _bring_up_to_date(stage, force, push, shown)
        if push:
            _hand_out(stage)
        done = True
    finally:
        shown.leave(stage, done)
    return "ran" if ran else Completed(name="Cached", message="DVC: nothing changed", data="cached")


def _bring_up_to_date(stage: str, force: bool, push: bool, shown: progress.Progress) -> bool:
    if push and not force and _is_recorded(stage):
        return False
    if push and (paths := git_sync.inputs(stage)):
        code, lines = dvc("pull", *paths)
        if code != 0:
            raise _pull_failure(stage, code, lines)
    with concurrency.slot(get_run_logger()) if stage.partition("@")[0] in GPU_STAGES else contextlib.nullcontext():
        options = ["--force"] if force else []
        code, lines = dvc("repro", "--single-item", *options, stage, on_state=lambda state: shown.see(stage, state))
    if code != 0:
        raise _failure(stage, code, lines)
    return _unchanged(stage) not in lines


def _is_recorded(stage: str) -> bool:
    """Whether dvc.lock holds this stage with today's params and inputs, wherever its files may be."""
    code, lines = dvc("repro", "--single-item", "--allow-missing", "--dry", stage, quiet=True)
    return code == 0 and _unchanged(stage) in lines


def _unchanged(stage: str) -> str:
    return f"Stage '{stage}' didn't change, skipping"


def _hand_out(stage: str) -> None:
    code, lines = dvc("push", stage)
    if code != 0:
        raise StageDied(f"push of {stage}: {last_words(lines, code)}")
    if git_sync.upstream() is None:
        get_run_logger().info("dvc.lock stays here: this folder follows no Git branch")
        return
    try:
        if git_sync.publish(stage):
            get_run_logger().info("Published the entry of %s in dvc.lock", stage)
    except UserError as error:  # a network that is away may come back
        raise StageDied(str(error)) from None


def dvc(command: str, *arguments: str, on_state=lambda state: None, quiet: bool = False) -> tuple[int, list[str]]:
    """Run a `dvc` command that waits for its locks; its exit code and last lines. `quiet` logs them as debug."""
    whole = [sys.executable, "-m", "srpo.runtime.fork_server", "dvc", "--wait-for-lock", command, *arguments]
    log = get_run_logger()
    return run_group(whole, log.debug if quiet else log.info, on_state)


def _pull_failure(stage: str, code: int, lines: list[str]) -> BadInput | StageDied:
    text = "\n".join(lines)
    if "Checkout failed for following targets" in text or "No such file or directory" in text:
        missing = git_sync.inputs(stage)
        return BadInput(f"{stage}: its inputs ({', '.join(missing)}) are not all in the remote; run their stages first")
    return StageDied(f"pull for {stage}: {last_words(lines, code)}")


def _failure(stage: str, code: int, lines: list[str]) -> BadInput | StageDied:
    text = "\n".join(lines)
    exited = re.findall(r"failed to run: .*, exited with (-?\d+)$", text, re.MULTILINE)
    if exited and int(exited[-1]) == BAD_INPUT:
        own = re.findall(r"srpo: error: (.*)", text)
        return BadInput(own[-1] if own else f"{stage}: refused its input")
    words = last_words(lines, code)
    # dvc's own statuses are 251 to 255; before a stage starts they mean a missing dependency or a broken file
    if code >= 251 and not any(line.startswith("Running stage ") for line in lines):
        if missing := MISSING.search(words):
            path = (missing[1] or missing[2]).removeprefix(f"{Path.cwd()}/")
            words = f"{path} does not exist; `dvc pull` brings what DVC tracks"
        return BadInput(f"{stage}: {words}")
    return StageDied(f"{stage}: {words}")


def last_words(lines: list[str], code: int) -> str:
    """The line in which a `dvc` command that failed says why."""
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or [f"exit status {code}"])[-1]
