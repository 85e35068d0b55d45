"""deploy/ray: valid against Ray's own schema, and what the security page says of it holds."""

from __future__ import annotations

import json
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

FOLDER = Path(__file__).parents[2] / "deploy" / "ray"


def read(name: str) -> dict[str, Any]:
    return YAML(typ="safe").load(FOLDER / name)


def test_the_autoscaler_accepts_cluster_yaml() -> None:
    spec = find_spec("ray")
    if spec is None or spec.origin is None:
        pytest.skip("Ray is not installed")
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(read("cluster.yaml"), schema)


def test_the_ray_job_runs_dvc_where_no_stage_computes() -> None:
    spec = read("rayjob.yaml")["spec"]
    cluster = spec["rayClusterSpec"]
    assert spec["entrypoint"] == "dvc repro"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] == 0 < group["maxReplicas"]


def test_the_slurm_script_is_bash() -> None:
    subprocess.run(["bash", "-n", FOLDER / "slurm.sh"], check=True)


@pytest.mark.parametrize("name", ["cluster.yaml", "rayjob.yaml", "slurm.sh"])
def test_usage_statistics_are_off(name: str) -> None:
    text = (FOLDER / name).read_text()
    starts = text.count("ray start") if name == "cluster.yaml" else 1
    assert text.count("RAY_USAGE_STATS_ENABLED") >= starts
