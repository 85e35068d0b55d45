"""The flow `srpo-rounds`: every stage of the wanted rounds, one Prefect task each, one DVC stage each.

DVC owns the graph, the cache and the lock file; a task is `dvc repro --single-item <stage>` in a child process.
`python -m flows.rounds` runs it here and now; `prefect deployment run srpo-rounds/local` has a worker run it.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import TerminationSignal
from prefect.states import Completed, Failed, State

from flows import server
from flows.process import run_group
from srpo import rounds as tree
from srpo import summary, warm
from srpo.errors import UserError
from srpo.params import Params, load_params

ROUND_STAGES = ("generate", "score", "select", "train", "evaluate", "report")
BASE_STAGES = ("base", "evaluate-base")
BAD_INPUT = 2
PROJECTIONS = {
    "track": "MLflow is behind; `srpo track` brings it up to date when it can be reached",
    "campaign": "rounds/index.html is behind; `srpo campaign` writes it",
}
EXIT_SECONDS = 10
# DVC says the first of a stage that it can cache, the second of any other
MISSING = re.compile(r"No such file or directory: '(.+)'|dependency '(.+)' does not exist")
RETRIES = 2
RETRY_DELAYS = [float(os.environ.get("SRPO_RETRY_DELAY", "10")) * factor for factor in (1, 4)]


class StageDied(RuntimeError):
    """A stage died; its last words are in the run's log. It may be tried again."""


class BadInput(RuntimeError):
    """A stage, or DVC before it, refused its input. Trying again would give the same answer."""


def _may_retry(_task, _run, state) -> bool:
    return not isinstance(state.result(raise_on_failure=False), BadInput)


@task(
    task_run_name="{stage}",
    cache_policy=NO_CACHE,
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=_may_retry,
)
def reproduce(stage: str, force: bool = False, push: bool = False) -> State[str] | str:
    """Reproduce one DVC stage; `dvc push` its outputs if asked.

    Returns:
        `ran`, or the state Cached when DVC found nothing to do.

    Raises:
        BadInput: the stage exited with status 2, or DVC did not even start it.
        StageDied: anything else went wrong.
    """
    code, lines = _dvc("repro", "--single-item", *(["--force"] if force else []), stage)
    if code != 0:
        raise _failure(stage, code, lines)
    if push:
        code, pushed = _dvc("push", stage)
        if code != 0:
            raise StageDied(f"push of {stage}: {_last_words(pushed, code)}")
    if f"Stage '{stage}' didn't change, skipping" in lines:
        return Completed(name="Cached", message="DVC: nothing changed", data="cached")
    return "ran"


@flow(name="srpo-rounds", flow_run_name="srpo-rounds", validate_parameters=True)
def srpo_rounds(rounds: list[str] | None = None, push: bool = False, force: bool = False) -> State | None:
    """Bring rounds up to date: base first, then each round's stages, parents before children.

    Args:
        rounds: keys of `rounds` in params.yaml; None means all of them. Their ancestors come along.
        push: `dvc push` each stage's outputs to the default remote as soon as it is done.
        force: run the named rounds' stages even if nothing changed.
    """
    try:
        params = load_params()
        keys = needed(params, rounds)
        with warm.started():
            for stage in BASE_STAGES:
                reproduce(stage, push=push)
            for key in keys:
                forced = force and key in (rounds or keys)
                for stage in ROUND_STAGES:
                    reproduce(f"{stage}@{key}", force=forced, push=push)
                    if stage == "evaluate":
                        _show_table(key)
                _show_addresses(params, key)
            # projections of finished rounds: when one fails the rounds still stand
            for command, behind in PROJECTIONS.items():
                if run_group([sys.executable, "-m", "srpo", command], get_run_logger().info)[0] != 0:
                    get_run_logger().warning(behind)
    except (UserError, BadInput) as error:  # returned, not raised: the user needs the line, not a traceback
        return Failed(message=str(error), data=error)
    return None


def needed(params: Params, rounds: list[str] | None) -> list[str]:
    """The rounds to bring up to date for `rounds` (None: all): they and their ancestors, parents first.

    Raises:
        UserError: params.yaml has no such round.
    """
    wanted = list(params.rounds) if rounds is None else rounds
    if unknown := [key for key in wanted if key not in params.rounds]:
        raise UserError(f"rounds: no round {unknown[0]!r} in params.yaml; it has {', '.join(params.rounds)}")
    keys = {ancestor for key in wanted for ancestor in [*tree.ancestors(params.rounds, key), key]}
    return [key for key in tree.order(params.rounds) if key in keys]


def _dvc(command: str, *arguments: str) -> tuple[int, list[str]]:
    whole = [sys.executable, "-m", "srpo.warm", "dvc", "--wait-for-lock", command, *arguments]
    return run_group(whole, get_run_logger().info)


def _failure(stage: str, code: int, lines: list[str]) -> BadInput | StageDied:
    text = "\n".join(lines)
    exited = re.findall(r"failed to run: .*, exited with (-?\d+)$", text, re.MULTILINE)
    if exited and int(exited[-1]) == BAD_INPUT:
        own = re.findall(r"srpo: error: (.*)", text)
        return BadInput(own[-1] if own else f"{stage}: refused its input")
    words = _last_words(lines, code)
    # dvc's own statuses are 251 to 255; before a stage starts they mean a missing dependency or a broken file
    if code >= 251 and not any(line.startswith("Running stage ") for line in lines):
        if missing := MISSING.search(words):
            path = (missing[1] or missing[2]).removeprefix(f"{Path.cwd()}/")
            words = f"{path} does not exist; `dvc pull` brings what DVC tracks"
        return BadInput(f"{stage}: {words}")
    return StageDied(f"{stage}: {words}")


def _last_words(lines: list[str], code: int) -> str:
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or [f"exit status {code}"])[-1]


def _show_table(key: str) -> None:
    create_table_artifact(summary.campaign_table("."), key="srpo-metrics", description=f"All rounds up to {key}")


def _show_addresses(params: Params, key: str) -> None:
    create_markdown_artifact(
        "".join(f"- {name}: `{value}`\n" for name, value in summary.addresses(params, key).items()),
        key=f"srpo-round-{key.lower().replace('_', '-')}",
        description=f"Where to look at round {key}",
    )


def main(
    round_: Annotated[
        list[str] | None, typer.Option("--round", help="a round to bring up to date; default all")
    ] = None,
    push: Annotated[bool, typer.Option(help="dvc push each stage's outputs")] = False,
    force: Annotated[bool, typer.Option(help="run stages that did not change, too")] = False,
) -> None:
    """Run the flow here and now, with a warm process behind it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        needed(load_params(), round_)  # before the seconds that Prefect takes to start
        # the warm server's imports overlap with Prefect's start
        with warm.started(), server.provided():
            srpo_rounds(rounds=round_, push=push, force=force)
    except (UserError, BadInput) as error:
        print(f"srpo: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (StageDied, server.NoServer) as error:
        print(f"srpo: error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except (KeyboardInterrupt, TerminationSignal):
        print("srpo: interrupted", file=sys.stderr)
        # a signal that comes in the middle of a log line can leave Prefect's threads waiting for each other at exit
        bound = threading.Timer(EXIT_SECONDS, os._exit, [130])
        bound.daemon = True
        bound.start()
        raise SystemExit(130) from None


if __name__ == "__main__":
    typer.run(main)
