"""The flow `srpo-promote`: a round whose gate passed waits for a human and becomes the registry's champion.

`python -m flows.promote --round 001 --auto` promotes here and now; `prefect deployment run srpo-promote/promote` has a
worker wait for the human, who finds the form behind the flow run's Resume button.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import FailedRun, FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed, Failed, State
from pydantic import Field

from flows import prefect_server
from flows.errors import show_in_one_line
from srpo.config.loader import load_params
from srpo.data.records import read_gate, read_metrics
from srpo.errors import UserError
from srpo.release import registry
from srpo.reporting import table
from srpo.rounds import Round, RoundFiles

POLL_SECONDS = 10


class Approval(RunInput):
    """What the human fills in."""

    approve: bool = Field(description="promote this adapter to champion")
    reason: str = Field(min_length=1, description="why; it is recorded with the version")


@task(cache_policy=NO_CACHE)
def register(key: str, decision: registry.Decision, adapter: str) -> str:
    """Make the round's adapter the champion; returns `<model> <version>`."""
    version = registry.promote(Round.of(load_params(), Path.cwd(), key), decision, adapter)
    return f"{version.name} {registry.number(version)}"


@flow(name="srpo-promote", flow_run_name="srpo-promote-{round}", validate_parameters=True)
def srpo_promote(round: str, auto: bool = False, override: str | None = None, wait_hours: float = 72) -> State:
    """Register a round's adapter in MLflow with the alias `champion`; the one before it becomes `previous`.

    Args:
        round: key of `rounds` in params.yaml.
        auto: ask no human.
        override: the reason to promote a round that the gate failed; without it such a round is refused.
        wait_hours: how long the flow waits for the human.
    """
    show_in_one_line()
    try:
        adapter = registry.check(Round.of(load_params(), Path.cwd(), round), override)
        decision = registry.Decision("auto", "auto", override)
        if not auto:
            answer = _ask(round, adapter, override, wait_hours)
            if not answer.approve:
                return Completed(name="Rejected", message=f"round {round}: not promoted: {answer.reason}")
            decision = registry.Decision("human", answer.reason, override)
        done = register(round, decision, adapter)
    except UserError as error:  # returned, not raised: the user needs the line, not a traceback
        return Failed(message=str(error), data=error)
    except FlowPauseTimeout:  # the server has failed the run by then, and keeps its own words for it
        get_run_logger().error(_late(round, wait_hours))
        raise
    get_run_logger().info("%s is the champion: round %s", done, round)
    return Completed(message=f"{done} is the champion: round {round}", data=done)


def _late(key: str, hours: float) -> str:
    return f"round {key}: nobody decided within {hours:g} hours; promote it again"


def _ask(key: str, adapter: str, override: str | None, hours: float) -> Approval:
    told = _told(key, adapter, override)
    create_markdown_artifact(told, key=f"srpo-promote-{key.lower().replace('_', '-')}", description=f"Promote {key}?")
    form = Approval.with_initial_data(description=told, approve=False)
    return pause_flow_run(wait_for_input=form, timeout=max(1, int(hours * 3600)), poll_interval=POLL_SECONDS)


def _told(key: str, adapter: str, override: str | None) -> str:
    """What the human should know, as Markdown."""
    params, files = load_params(), RoundFiles(Path.cwd(), key)
    gate = read_gate(files)
    rules = [
        f"| {name} | {table.show(rule['value'])} | {rule['sense']} {table.show(rule['limit'])} "
        f"| {'passed' if rule['passed'] else '**failed**'} |"
        for name, rule in gate["rules"].items()
    ]
    places = [f"- {name}: `{value}`" for name, value in table.addresses(params, key).items()]
    lines = [f"Make round **{key}** the champion? The gate says: **{table.verdict(read_metrics(files))}**."]
    lines += (
        [f"It would be promoted in spite of the gate: {override}"] if override and gate["verdict"] != "pass" else []
    )
    lines += ["", "| rule | value | asked for | |", "|---|---|---|---|", *rules, "", f"- adapter: `{adapter}`", *places]
    return "\n".join(lines)


def main(
    round: Annotated[str, typer.Option("--round", help="the round to promote")],
    auto: Annotated[bool, typer.Option("--auto", help="ask no human")] = False,
    override: Annotated[str | None, typer.Option(help="why to promote a round that the gate failed")] = None,
    wait_hours: Annotated[float, typer.Option(help="how long to wait for the human")] = 72,
) -> None:
    """Run the flow here and now."""
    try:
        registry.check(
            Round.of(load_params(), Path.cwd(), round), override
        )  # before the seconds that Prefect takes to start
        if not auto and not PREFECT_API_URL.value():
            raise UserError(
                "no Prefect server is configured, so nobody could approve; `prefect server start` and"
                " `prefect config set PREFECT_API_URL=http://127.0.0.1:4200/api`, or pass --auto"
            )
        with prefect_server.provided():
            srpo_promote(round=round, auto=auto, override=override, wait_hours=wait_hours)
    except (UserError, FailedRun, FlowPauseTimeout) as error:
        print(f"srpo: error: {error if isinstance(error, UserError) else _late(round, wait_hours)}", file=sys.stderr)
        raise SystemExit(2) from None
    except prefect_server.NoServer as error:
        print(f"srpo: error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("srpo: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    typer.run(main)
