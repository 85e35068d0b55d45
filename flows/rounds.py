"""The flow `srpo-rounds`: every stage of the wanted rounds, one Prefect task each, one DVC stage each.

DVC owns the graph, the cache and the lock file; a task is `dvc repro --single-item <stage>` in a child process.
Rounds of different branches of the tree run side by side, parents before children.
`python -m flows.rounds` runs it here and now; `prefect deployment run srpo-rounds/local` has a worker run it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from typing import Annotated

import typer
from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.exceptions import TerminationSignal
from prefect.states import Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from flows import concurrency, git_sync, prefect_server, process, progress
from flows.errors import BadInput, StageDied, show_in_one_line
from flows.process import run_group
from flows.stages import BASE_STAGES, ROUND_STAGES, dvc, last_words, reproduce
from srpo import rounds as tree
from srpo.config.loader import Params, load_params
from srpo.errors import UserError
from srpo.reporting import table
from srpo.runtime import fork_server

PROJECTIONS = {
    "track": "MLflow is behind; `srpo track` brings it up to date when it can be reached",
    "campaign": "rounds/index.html is behind; `srpo campaign` writes it",
}
EXIT_SECONDS = 10


@flow(name="srpo-rounds", flow_run_name="srpo-rounds", task_runner=ThreadPoolTaskRunner())
def srpo_rounds(
    rounds: list[str] | None = None, stages: list[str] | None = None, push: bool = False, force: bool = False
) -> State | None:
    """Bring rounds up to date: base first, then each round's stages, parents before children, siblings side by side.

    A stage that fails ends its branch; the others go on, and the flow fails at the end.

    Args:
        rounds: keys of `rounds` in params.yaml; None means all of them. Their ancestors come along.
        stages: names of stages (`generate`, `train`, `evaluate-base`); None means all. A runner that only trains
            leaves the other stages to others.
        push: work as a runner without a shared disk: start from the upstream Git branch, pull what each stage needs
            from the default DVC remote, push its outputs there and its entry of dvc.lock to Git.
        force: run the named rounds' stages even if nothing changed.
    """
    process.stopping.clear()
    process.end_with_worker()
    show_in_one_line()
    try:
        params = _prepare(push)
        graph = plan(params, rounds, stages)
        concurrency.ensure_limit()
        progress.current.set(progress.Progress(list(graph)))
        named = rounds or needed(params, rounds)
        forced = {stage for stage in graph if force and stage.partition("@")[2] in named}
        with fork_server.started(), prefect_server.watched(), _ended_together():
            problems = _walk(params, graph, forced, push)
            _project()
        if push and git_sync.upstream():
            git_sync.take_over()
    except UserError as error:
        problems = [error]
    # returned, not raised: the user needs the line, not a traceback
    return Failed(message=str(error := _first(problems)), data=error) if problems else None


@contextlib.contextmanager
def _ended_together() -> Iterator[None]:
    """Whatever ends the block ends the stages that run: their tasks' threads know nothing of a signal."""
    try:
        yield
    except BaseException:
        if __name__ == "__main__":  # a worker has a bound of its own
            _exit_in_time()
        process.end_all()
        raise


def plan(params: Params, rounds: list[str] | None, stages: list[str] | None = None) -> dict[str, list[str]]:
    """The stages to bring up to date, each after those it waits for: {stage: stages before it}.

    A round's stages run one after another, and its first one when its parent is through.

    Raises:
        UserError: there is no such round or stage.
    """
    known = (*BASE_STAGES, *ROUND_STAGES)
    if unknown := [name for name in stages or () if name not in known]:
        raise UserError(f"stages: no stage {unknown[0]!r}; there are {', '.join(known)}")
    keys = needed(params, rounds)
    graph: dict[str, list[str]] = {}
    last: dict[str, list[str]] = {}  # of each round, where its children begin
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
    """The rounds to bring up to date for `rounds` (None: all): they and their ancestors, parents first.

    Raises:
        UserError: params.yaml has no such round.
    """
    wanted = list(params.rounds) if rounds is None else rounds
    if unknown := [key for key in wanted if key not in params.rounds]:
        raise UserError(f"rounds: no round {unknown[0]!r} in params.yaml; it has {', '.join(params.rounds)}")
    keys = {ancestor for key in wanted for ancestor in [*tree.ancestors(params.rounds, key), key]}
    return [key for key in tree.order(params.rounds) if key in keys]


def _prepare(push: bool) -> Params:
    if push and git_sync.upstream():
        git_sync.take_over()
        if files := git_sync.sources():
            code, lines = dvc("pull", *files)
            if code != 0:
                raise UserError(f"{files[0]}: `dvc pull` failed: {last_words(lines, code)}")
    return load_params()


def _walk(params: Params, graph: dict[str, list[str]], forced: set[str], push: bool) -> list[Exception]:
    """Start each stage when those before it are done, until no more can be started; returns what failed."""
    waiting, futures, done, running = dict(graph), {}, set(), set()
    over: SimpleQueue[str] = SimpleQueue()
    problems = []
    while True:
        for stage in [stage for stage, before in waiting.items() if done.issuperset(before)]:
            after = [futures[name] for name in waiting.pop(stage)]  # done, but the run's page draws the graph from them
            futures[stage] = reproduce.submit(stage, force=stage in forced, push=push, wait_for=after)
            running.add(stage)
            futures[stage].add_done_callback(lambda _, stage=stage: over.put(stage))
        if not running:
            progress.current.get().finish()
            return problems
        running.remove(stage := over.get())
        futures[stage].wait()
        if not futures[stage].state.is_completed():
            problems.append(futures[stage].state.result(raise_on_failure=False))
            continue
        done.add(stage)
        name, _, key = stage.partition("@")
        if name == "evaluate":
            _show_table(key)
        if name == "report":
            _show_addresses(params, key)


def _project() -> None:
    """Bring up to date what is made from finished rounds: when one fails the rounds still stand."""
    for command, behind in PROJECTIONS.items():
        if run_group([sys.executable, "-m", "srpo", command], get_run_logger().info)[0] != 0:
            get_run_logger().warning(behind)


def _first(problems: Iterable[Exception]) -> Exception:
    first, *others = problems
    return type(first)(f"{first}; and {'; '.join(map(str, others))}") if others else first


def _show_table(key: str) -> None:
    create_table_artifact(table.campaign_table("."), key="srpo-metrics", description=f"All rounds up to {key}")


def _show_addresses(params: Params, key: str) -> None:
    create_markdown_artifact(
        "".join(f"- {name}: `{value}`\n" for name, value in table.addresses(params, key).items()),
        key=f"srpo-round-{key.lower().replace('_', '-')}",
        description=f"Where to look at round {key}",
    )


def main(
    round_: Annotated[
        list[str] | None, typer.Option("--round", help="a round to bring up to date; default all")
    ] = None,
    stage: Annotated[list[str] | None, typer.Option(help="a stage to run, as generate or train; default all")] = None,
    push: Annotated[bool, typer.Option(help="pull inputs, push outputs and the entries of dvc.lock")] = False,
    force: Annotated[bool, typer.Option(help="run stages that did not change, too")] = False,
) -> None:
    """Run the flow here and now, with a warm process behind it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if not push:  # else the rounds may come with the upstream branch
            plan(load_params(), round_, stage)  # before the seconds that Prefect takes to start
        # the warm server's imports overlap with Prefect's start
        with fork_server.started(), prefect_server.provided():
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
    """Exit soon, whatever the threads do: one may sleep until its retry; a signal in the middle of a log line can
    leave Prefect's waiting for each other.
    """
    bound = threading.Timer(EXIT_SECONDS, os._exit, [130])
    bound.daemon = True
    bound.start()


if __name__ == "__main__":
    typer.run(main)
