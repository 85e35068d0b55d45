"""The flow `srpo-rounds`: every stage of the wanted rounds, one Prefect task each, one DVC stage each.

DVC owns the graph, the cache and the lock file; a task is `dvc repro --single-item <stage>` in a child process.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from typing import Annotated

import typer
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from flows.process import run_group
from srpo import rounds as tree
from srpo import summary, warm
from srpo.errors import UserError
from srpo.params import load_params

ROUND_STAGES = ("generate", "score", "select", "train", "evaluate", "report")
BAD_INPUT = 2
RETRIES = 2
RETRY_DELAYS = [float(os.environ.get("SRPO_RETRY_DELAY", 10)) * factor for factor in (1, 4)]


class StageFailed(RuntimeError):
    """A stage died; its last words are in the run's log. It may be tried again."""


class BadInput(RuntimeError):
    """A stage refused its input. Trying again would give the same answer."""


def _may_retry(_task, _run, state) -> bool:
    return not isinstance(state.result(raise_on_failure=False), BadInput)


@task(
    task_run_name="{stage}",
    cache_policy=NO_CACHE,
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=_may_retry,
)
def reproduce(stage: str, force: bool = False, push: bool = False) -> str:
    """Reproduce one DVC stage; `dvc push` its outputs if asked.

    Returns:
        `ran`, or `unchanged` when DVC found nothing to do.

    Raises:
        BadInput: the stage exited with status 2.
        StageFailed: anything else went wrong.
    """
    code, lines = _dvc(["--wait-for-lock", "repro", "--single-item", *(["--force"] if force else []), stage])
    if code != 0:
        _raise(stage, code, lines)
    if push:
        code, lines = _dvc(["push", stage])
        if code != 0:
            _raise(f"push of {stage}", code, lines)
    return "unchanged" if any("didn't change" in line for line in lines) else "ran"


@flow(name="srpo-rounds", flow_run_name="srpo-rounds", validate_parameters=True)
def srpo_rounds(rounds: list[str] | None = None, push: bool = False, force: bool = False) -> None:
    """Bring rounds up to date: base first, then each round's stages, parents before children.

    Args:
        rounds: keys of `rounds` in params.yaml; None means all of them. Their ancestors come along.
        push: `dvc push` each stage's outputs to the default remote as soon as it is done.
        force: run the named rounds' stages even if nothing changed.
    """
    params = load_params()
    wanted = rounds or list(params.rounds)
    if unknown := [key for key in wanted if key not in params.rounds]:
        raise UserError(f"rounds: no round {unknown[0]!r} in params.yaml; it has {', '.join(params.rounds)}")
    needed = {ancestor for key in wanted for ancestor in [*tree.ancestors(params.rounds, key), key]}
    for stage in ("base", "evaluate-base"):
        reproduce(stage, push=push)
    for key in tree.order(params.rounds):
        if key in needed:
            for stage in ROUND_STAGES:
                reproduce(f"{stage}@{key}", force=force and key in wanted, push=push)
            _show(key, params.tracking.uri)
    code, _ = run_group([sys.executable, "-m", "srpo", "track"], get_run_logger().info)
    if code != 0:
        get_run_logger().warning("MLflow is behind; `srpo track` brings it up to date when it can be reached")


def _dvc(arguments: list[str]) -> tuple[int, list[str]]:
    return run_group([sys.executable, "-m", "srpo.warm", "dvc", *arguments], get_run_logger().info)


def _raise(what: str, code: int, lines: list[str]) -> None:
    text = "\n".join(lines)
    own = re.findall(r"srpo: error: (.*)", text)
    exited = re.findall(r"exited with (-?\d+)", text)
    if exited and int(exited[-1]) == BAD_INPUT:
        raise BadInput(own[-1] if own else f"{what}: refused its input")
    raise StageFailed(f"{what}: {lines[-1] if lines else f'exit status {code}'}")


def _show(key: str, tracking_uri: str) -> None:
    create_table_artifact(summary.campaign_table("."), key="srpo-metrics", description=f"All rounds up to {key}")
    create_markdown_artifact(
        f"- report: `rounds/{key}/report/index.html`\n"
        f"- MLflow: `mlflow ui --backend-store-uri {_safe(tracking_uri)}`\n",
        key=f"srpo-round-{key.lower().replace('_', '-')}",
        description=f"Where to look at round {key}",
    )


def _safe(uri: str) -> str:
    """The URI without user and password: artifacts are for everyone to read."""
    return re.sub(r"//[^/@]*@", "//", uri)


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
        load_params()
        with warm.started():
            srpo_rounds(rounds=round_, push=push, force=force)
    except (UserError, BadInput) as error:
        print(f"srpo: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except StageFailed as error:
        print(f"srpo: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    typer.run(main)
