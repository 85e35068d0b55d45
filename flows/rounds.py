"""The flow `srpo-rounds`: one Prefect task per DVC stage of the requested rounds.

DVC owns the graph, the cache and the lock file; a task is `dvc repro --single-item <stage>` in a child process.
Rounds of different branches of the tree run in parallel, parents before children.
`python -m flows.rounds` runs the flow in this process; `prefect deployment run srpo-rounds/local` runs it in a worker.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from queue import SimpleQueue
from typing import Annotated, Any

import typer
from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.exceptions import TerminationSignal
from prefect.futures import PrefectFuture
from prefect.states import Completed, Failed, State

from flows import concurrency, git_sync, prefect_server, process, progress
from flows.errors import BadInput, StageDied, show_in_one_line
from flows.names import artifact_key, run_name
from flows.process import run_group
from flows.stages import BASE_STAGES, CACHED, ROUND_STAGES, dvc, last_error, reproduce
from srpo.config import tree
from srpo.config.loader import Params, load_params
from srpo.errors import UserError
from srpo.reporting import table
from srpo.runtime import fork_server

# commands after all rounds, and the warning if one fails
SUMMARIES = {
    "track": "MLflow is not up to date; run `srpo track` when it can be reached",
    "campaign": "rounds/index.html is not up to date; run `srpo campaign`",
}
EXIT_SECONDS = 10


@flow(name="srpo-rounds", flow_run_name=run_name)
def srpo_rounds(
    rounds: list[str] | None = None, stages: list[str] | None = None, push: bool = False, force: bool = False
) -> State:
    """Bring rounds up to date: base first, then each round's stages, parents before children, siblings in parallel.

    A failed stage ends its branch; the other branches continue, and the flow fails at the end.

    Args:
        rounds: keys of `rounds` in params.yaml, whose ancestors are included; None means all.
        stages: names of stages (`generate`, `train`, `evaluate-base`); None means all. Other runners may run the rest.
        push: work as a runner without a shared disk: start from the upstream Git branch, pull the inputs of each stage
            from the default DVC remote, push its outputs there and its entry of dvc.lock to Git.
        force: run the stages of the requested rounds even if nothing changed.
    """
    process.stopping.clear()
    process.end_with_worker()
    show_in_one_line()
    summary = ""
    problems: list[Exception]
    try:
        params = _prepare(push)
        graph = plan(params, rounds, stages)
        concurrency.ensure_limit()
        progress.current.set(progress.Progress(list(graph)))
        requested = rounds or needed(params, rounds)
        forced = {stage for stage in graph if force and stage.partition("@")[2] in requested}
        with fork_server.if_requested(), prefect_server.exit_without_server(), _stop_together():
            problems, summary = _walk(params, graph, forced, push)
            _write_summaries()
        if push and git_sync.upstream():
            git_sync.fast_forward()
    except UserError as error:
        problems = [error]
    if not problems:
        return Completed(message=summary, data=summary)
    failure = _combine(problems)
    return Failed(message=str(failure), data=failure)  # returned, not raised: a line without a traceback


@contextlib.contextmanager
def _stop_together() -> Iterator[None]:
    """Stop the running stages when the block ends early: the threads of their tasks get no signal."""
    try:
        yield
    except BaseException:
        if __name__ == "__main__":  # a worker has its own time limit
            _exit_in_time()
        process.end_all()
        raise


def plan(params: Params, rounds: list[str] | None, stages: list[str] | None = None) -> dict[str, list[str]]:
    """Return the stages to bring up to date, each with the stages it waits for.

    A round's stages run in sequence, and the first one waits for the parent's last one.

    Raises:
        UserError: no such round or stage.
    """
    known = (*BASE_STAGES, *ROUND_STAGES)
    if unknown := [name for name in stages or () if name not in known]:
        raise UserError(f"stages: no stage {unknown[0]!r}; use {', '.join(known)}")
    keys = needed(params, rounds)
    graph: dict[str, list[str]] = {}
    last: dict[str, list[str]] = {}  # the stage of each round that its children wait for
    for key in (tree.BASE, *keys):
        before = [] if key == tree.BASE else last[params.rounds[key].parent]
        names = BASE_STAGES if key == tree.BASE else ROUND_STAGES
        for name in (name for name in names if stages is None or name in stages):
            stage = name if key == tree.BASE else f"{name}@{key}"
            graph[stage] = before
            before = [stage]
        last[key] = before
    return graph


def needed(params: Params, rounds: list[str] | None) -> list[str]:
    """Return `rounds` (None: all) and their ancestors, parents first.

    Raises:
        UserError: params.yaml has no such round.
    """
    requested = list(params.rounds) if rounds is None else rounds
    if unknown := [key for key in requested if key not in params.rounds]:
        raise UserError(f"rounds: no round {unknown[0]!r} in params.yaml; it has {', '.join(params.rounds)}")
    keys = {ancestor for key in requested for ancestor in [*tree.ancestors(params.rounds, key), key]}
    return [key for key in tree.order(params.rounds) if key in keys]


def _prepare(push: bool) -> Params:
    if push and git_sync.upstream():
        git_sync.fast_forward()
        if files := git_sync.sources():
            code, lines = dvc("pull", *files)
            if code != 0:
                raise UserError(f"{files[0]}: `dvc pull` failed: {last_error(lines, code)}")
    return load_params()


def _walk(params: Params, graph: dict[str, list[str]], forced: set[str], push: bool) -> tuple[list[Exception], str]:
    """Start each stage when those before it are done, until no more can be started.

    Returns:
        The errors of failed stages, and a line that counts the stages which ran and those which were cached.
    """
    waiting = dict(graph)
    futures: dict[str, PrefectFuture[Any]] = {}
    done: set[str] = set()
    cached: set[str] = set()
    running: set[str] = set()
    ended: SimpleQueue[str] = SimpleQueue()
    problems: list[Exception] = []
    while True:
        for stage in [stage for stage, before in waiting.items() if done.issuperset(before)]:
            before = [futures[name] for name in waiting.pop(stage)]  # done, but Prefect draws the graph from them
            futures[stage] = reproduce.submit(
                stage, force=stage in forced, push=push, wait_for=before, return_state=False
            )
            running.add(stage)
            futures[stage].add_done_callback(partial(_report_end, ended, stage))
        if not running:
            progress.current.get().finish()
            summary = f"{len(done - cached)} stages ran, {len(cached)} were cached (nothing changed)"
            get_run_logger().info(summary)
            return problems, summary
        running.remove(stage := ended.get())
        futures[stage].wait()
        if not futures[stage].state.is_completed():
            problems.append(futures[stage].state.result(raise_on_failure=False))
            continue
        done.add(stage)
        if futures[stage].state.name == CACHED:
            cached.add(stage)
        name, _, key = stage.partition("@")
        if name == "gate":
            _show_table(key)
        if name == "report":
            _show_addresses(params, key)


def _report_end(ended: SimpleQueue[str], stage: str, _future: PrefectFuture[Any]) -> None:
    ended.put(stage)


def _write_summaries() -> None:
    """Update MLflow and the campaign's page; if that fails, the rounds are still complete."""
    for command, warning in SUMMARIES.items():
        if run_group([sys.executable, "-m", "srpo", command], get_run_logger().info)[0] != 0:
            get_run_logger().warning(warning)


def _combine(problems: Iterable[Exception]) -> Exception:
    first, *others = problems
    return type(first)(f"{first}; and {'; '.join(map(str, others))}") if others else first


def _show_table(key: str) -> None:
    create_table_artifact(table.campaign_table("."), key=artifact_key("metrics"), description=f"All rounds up to {key}")


def _show_addresses(params: Params, key: str) -> None:
    create_markdown_artifact(
        "".join(f"- {name}: `{value}`\n" for name, value in table.addresses(params, key).items()),
        key=artifact_key(f"round-{key}"),
        description=f"Addresses of round {key}",
    )


def main(
    round_: Annotated[list[str] | None, typer.Option("--round", help="round to bring up to date; default all")] = None,
    stage: Annotated[list[str] | None, typer.Option(help="stage to run, such as generate; default all")] = None,
    push: Annotated[bool, typer.Option(help="pull inputs, push outputs and entries of dvc.lock")] = False,
    force: Annotated[bool, typer.Option(help="also run stages whose inputs did not change")] = False,
    warm: Annotated[bool, typer.Option(help="start stages from a process that has imported everything")] = False,
) -> None:
    """Run the flow in this process."""
    if warm:
        os.environ[fork_server.REQUEST_VARIABLE] = "1"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if not push:  # else the upstream branch may bring other rounds
            plan(load_params(), round_, stage)  # report bad input before Prefect's start, which takes seconds
        # the fork server's imports overlap with Prefect's start
        with fork_server.if_requested(), prefect_server.ensure_server():
            srpo_rounds(rounds=round_, stages=stage, push=push, force=force)
    except (UserError, BadInput) as error:
        print(f"srpo: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (StageDied, prefect_server.NoServer) as error:
        print(f"srpo: error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except (KeyboardInterrupt, TerminationSignal):
        _exit_in_time()
        print("srpo: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _exit_in_time() -> None:
    """Exit soon: a task may sleep until its retry, and a signal during logging can deadlock Prefect's threads."""
    timer = threading.Timer(EXIT_SECONDS, os._exit, [130])
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    typer.run(main)
