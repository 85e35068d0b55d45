"""prefect.yaml against the flow and against the job templates of the pools its deployments go to.

The templates in `templates/` are what `prefect work-pool get-default-base-job-template` gave: of prefect 3.9.1,
prefect-docker 0.7.4 and prefect-kubernetes 0.8.0.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from uuid import uuid4

import jsonschema
import pytest
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.schemas.automations import AutomationCore
from ruamel.yaml import YAML

from flows.rounds import srpo_rounds
from tests.flows.conftest import REPO

DEPLOYMENTS = {d["name"]: d for d in YAML(typ="safe").load((REPO / "prefect.yaml").read_text())["deployments"]}
DEFAULTS = Path(__file__).parent / "templates"
OWN_KUBERNETES = REPO / "deploy" / "kubernetes" / "base-job-template.json"
TEMPLATES = {
    "srpo-local": DEFAULTS / "process-3.9.1.json",
    "srpo-gpu": DEFAULTS / "process-3.9.1.json",
    "srpo-ray": DEFAULTS / "process-3.9.1.json",
    "srpo-docker": DEFAULTS / "docker-0.7.4.json",
    "srpo-kubernetes": OWN_KUBERNETES,
}


def template(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def check(variables: dict[str, Any], path: Path) -> None:
    """Against the pool's schema; a name that it does not have is an error, too, as a worker would ignore it."""
    schema = template(path)["variables"]
    assert set(variables) <= set(schema["properties"]), set(variables) - set(schema["properties"])
    jsonschema.validate(variables, schema)


def srpo_deployments() -> list[str]:
    return [name for name, deployment in DEPLOYMENTS.items() if deployment["work_pool"]["name"] in TEMPLATES]


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_entrypoint_and_parameters_exist(name: str) -> None:
    from prefect.flows import load_flow_from_entrypoint

    flow = load_flow_from_entrypoint(DEPLOYMENTS[name]["entrypoint"])
    parameters = DEPLOYMENTS[name].get("parameters", {})
    flow.validate_parameters(dict.fromkeys(flow.parameters.required, "001") | parameters)
    assert set(parameters) <= set(flow.parameters.properties)


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_no_deployers_folder_gets_in(name: str) -> None:
    whole = YAML(typ="safe").load((REPO / "prefect.yaml").read_text())
    first = (DEPLOYMENTS[name].get("pull") or whole["pull"])[0]
    assert set(first) <= {"prefect.deployments.steps.set_working_directory", "prefect.deployments.steps.git_clone"}


@pytest.mark.parametrize("name", srpo_deployments())
def test_job_variables_fit_the_pool(name: str) -> None:
    pool = DEPLOYMENTS[name]["work_pool"]
    check(pool.get("job_variables", {}), TEMPLATES[pool["name"]])


def test_check_finds_wrong_name_and_type() -> None:
    with pytest.raises(AssertionError, match="gpu"):
        check({"gpu": 1}, OWN_KUBERNETES)
    with pytest.raises(jsonschema.ValidationError):
        check({"gpus": "all"}, OWN_KUBERNETES)


def test_kubernetes_template() -> None:
    own, default = template(OWN_KUBERNETES), template(DEFAULTS / "kubernetes-0.8.0.json")
    added = set(own["variables"]["properties"]) - set(default["variables"]["properties"])
    assert added == {"gpus", "secret", "cache_claim"}
    assert set(default["variables"]["properties"]) <= set(own["variables"]["properties"])
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(own["job_configuration"])))
    assert used == set(own["variables"]["properties"])
    jsonschema.Draft202012Validator.check_schema(own["variables"])
    container = own["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "{{ gpus }}"


def test_notification_is_a_valid_automation() -> None:
    text = (REPO / "deploy" / "prefect" / "notify-on-failure.yaml").read_text()
    automation = AutomationCore.model_validate(YAML(typ="safe").load(text.replace("id: BLOCK_ID", f"id: {uuid4()}")))
    assert automation.trigger.match_related["prefect.resource.name"] == [srpo_rounds.name]


def test_example_schedule_is_valid_and_inactive() -> None:
    schedules = [s for deployment in DEPLOYMENTS.values() for s in deployment.get("schedules", [])]
    assert schedules
    for schedule in schedules:
        CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
        assert schedule["active"] is False
