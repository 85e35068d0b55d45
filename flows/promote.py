"""The flow `srpo-promote`: make a round that passed the gate the registry's champion, after a human's approval.

`python -m flows.promote --round 001 --auto` promotes at once; with `prefect deployment run srpo-promote/promote` a
worker waits for the human, who fills in the form behind the flow run's Resume button.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

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
from flows.names import artifact_key
from srpo.config.loader import load_params
from srpo.data.records import read_gate, read_metrics
from srpo.errors import UserError
from srpo.release import registry
from srpo.reporting import table
from srpo.rounds import Round, RoundFiles

POLL_SECONDS = 10


class Approval(RunInput):
    """The form that the human fills in."""

    approve: bool = Field(description="promote this adapter to champion")
    reason: str = Field(min_length=1, description="why; it is recorded with the version")


@task(cache_policy=NO_CACHE)
def register(key: str, decision: registry.Decision, adapter: str) -> str:
    """Make the round's adapter the champion and return `<model> <version>`."""
    version = registry.promote(Round.of(load_params(), Path.cwd(), key), decision, adapter)
    return f"{version.name} {registry.number(version)}"


@flow(name="srpo-promote", flow_run_name="srpo-promote-{round}", validate_parameters=True)
def srpo_promote(round: str, auto: bool = False, override: str | None = None, wait_hours: float = 72) -> State:
    """Register a round's adapter in MLflow with the alias `champion`; the current champion becomes `previous`.

    Args:
        round: key of `rounds` in params.yaml.
        auto: promote without asking a human.
        override: the reason to promote a round that failed the gate; without it such a round is refused.
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
    except UserError as error:  # returned, not raised: a line without a traceback
        return Failed(message=str(error), data=error)
    except FlowPauseTimeout:  # the server has failed the run already, with its own message
        get_run_logger().error(_timeout_message(round, wait_hours))
        raise
    get_run_logger().info("%s is the champion: round %s", done, round)
    return Completed(message=f"{done} is the champion: round {round}", data=done)


def _timeout_message(key: str, hours: float) -> str:
    return f"round {key}: no decision within {hours:g} hours; promote it again"


def _ask(key: str, adapter: str, override: str | None, hours: float) -> Approval:
    description = _describe(key, adapter, override)
    create_markdown_artifact(description, key=artifact_key(f"promote-{key}"), description=f"Promote {key}?")
    form = Approval.with_initial_data(description=description, approve=False)
    return pause_flow_run(wait_for_input=form, timeout=max(1, int(hours * 3600)), poll_interval=POLL_SECONDS)


def _describe(key: str, adapter: str, override: str | None) -> str:
    """Return the gate's rules and the round's addresses as Markdown."""
    params = load_params()
    files = RoundFiles(Path.cwd(), key)
    gate = read_gate(files)
    rules = [
        f"| {name} | {table.show(rule['value'])} | {rule['sense']} {table.show(rule['limit'])} "
        f"| {'passed' if rule['passed'] else '**failed**'} |"
        for name, rule in gate["rules"].items()
    ]
    places = [f"- {name}: `{value}`" for name, value in table.addresses(params, key).items()]
    lines = [f"Make round **{key}** the champion? The gate says: **{table.verdict(read_metrics(files))}**."]
    lines += (
        [f"It would be promoted although the gate failed it: {override}"]
        if override and gate["verdict"] != "pass"
        else []
    )
    lines += ["", _describe_votes(key, gate["human"])]
    lines += ["", "| rule | value | limit | |", "|---|---|---|---|", *rules, "", f"- adapter: `{adapter}`", *places]
    return "\n".join(lines)


def _describe_votes(key: str, human: dict[str, Any] | None) -> str:
    """Return what people voted as one line."""
    if human is None:
        return f"People: no votes count in the gate (`srpo review {key}`, `srpo votes {key} --freeze`)."
    rate = " to ".join(table.show(human["win_rate"][end]) for end in ("low", "high"))
    alpha = "" if human["alpha"] is None else f", Krippendorff's alpha {table.show(human['alpha'])}"
    return (
        f"People: win rate over base **{table.show(human['win_rate']['value'])}** ({rate}), {human['votes']} votes on"
        f" {human['prompts']} prompts, raters: {human['raters']}{alpha}."
    )


def main(
    round: Annotated[str, typer.Option("--round", help="the round to promote")],
    auto: Annotated[bool, typer.Option("--auto", help="promote without asking a human")] = False,
    override: Annotated[str | None, typer.Option(help="reason to promote a round that failed the gate")] = None,
    wait_hours: Annotated[float, typer.Option(help="how long to wait for the human")] = 72,
) -> None:
    """Run the flow in this process."""
    try:
        # report bad input before Prefect's start, which takes seconds
        registry.check(Round.of(load_params(), Path.cwd(), round), override)
        if not auto and not PREFECT_API_URL.value():
            raise UserError(
                "no Prefect server is configured, so nobody could approve; `prefect server start` and"
                " `prefect config set PREFECT_API_URL=http://127.0.0.1:4200/api`, or pass --auto"
            )
        with prefect_server.ensure_server():
            srpo_promote(round=round, auto=auto, override=override, wait_hours=wait_hours)
    except (UserError, FailedRun, FlowPauseTimeout) as error:
        print(
            f"srpo: error: {error if isinstance(error, UserError) else _timeout_message(round, wait_hours)}",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    except prefect_server.NoServer as error:
        print(f"srpo: error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("srpo: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    typer.run(main)
