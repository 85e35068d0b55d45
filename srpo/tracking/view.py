"""A saved view of the campaign's rounds in MLflow's UI: the columns to look at first, in the view for training."""

from __future__ import annotations

import json

from srpo.config.loader import Params
from srpo.errors import without_secrets
from srpo.storage.hashing import value_digest
from srpo.tracking.campaign import CURRENT, KIND, PROJECT, Campaign
from srpo.tracking.records import headline_names

VIEW = "mlflow.sharedViewState."  # tags of an experiment; MLflow 3.17 lists them in its menu "Views"
UI_ADDRESS = "http://127.0.0.1:5000"  # of `mlflow ui`


def save_view(campaign: Campaign, params: Params) -> str:
    """Save the view unless MLflow has it, and return its address: without it, MLflow opens on its view for chats."""
    key = value_digest([campaign.project, campaign.name])[:12]
    view = {
        "name": f"{campaign.name} ({campaign.project})",
        "createdAt": campaign.parent.info.start_time,
        "state": json.dumps(_state(campaign, params)),
    }
    tag, value = f"{VIEW}{key}", json.dumps(view)
    if campaign.client.get_experiment(campaign.experiment).tags.get(tag) != value:
        campaign.client.set_experiment_tag(campaign.experiment, tag, value)
    uri = params.tracking.uri
    server = without_secrets(uri).rstrip("/") if uri.startswith("http") else UI_ADDRESS
    return f"{server}/#/experiments/{campaign.experiment}/runs?workflowType=machine_learning&viewStateShareKey={key}"


def _state(campaign: Campaign, params: Params) -> dict[str, object]:
    """Return the state of MLflow's table of runs, by the names that its UI uses."""
    tags = {PROJECT: campaign.project, KIND: "round", CURRENT: "true"}
    return {
        "searchFilter": " AND ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items()),
        "orderByKey": "attributes.start_time",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "selectedColumns": [f"metrics.`{name}`" for name in headline_names(params)] + ["tags.`srpo.verdict`"],
    }
