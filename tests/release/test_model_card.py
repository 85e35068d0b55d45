"""The model card of a drawn campaign, read back as the Hub reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from srpo.config.loader import Params
from srpo.data.records import read_sweep
from srpo.lineage.record import read_lineage
from srpo.release.model_card import OPENRAIL, cell, license_of, render_card
from srpo.reporting.table import show
from srpo.rounds import Round, RoundFiles
from srpo.storage.json_files import write_json
from tests.support.campaign import build_campaign

LORA = {"diffusers": "pytorch_lora_weights.safetensors", "kohya": "tiny-002_kohya.safetensors"}
IMAGES = [("images/eval-0000.png", '<script>alert("x: y")</script> | # & co'), ("images/eval-0001.png", "a disc")]
SDXL = {"source": "stabilityai/stable-diffusion-xl-base-1.0", "revision": "46" * 20, "digest": None}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Params, Path]:
    root = tmp_path_factory.mktemp("card")
    params = build_campaign(root, size=8)
    path = RoundFiles(root, "002").adapter / "lineage.json"
    write_json(path, json.loads(path.read_text()) | {"base": SDXL})
    return params, root


def card(project: tuple[Params, Path], key: str, files: dict[str, str]) -> ModelCard:
    return ModelCard(render_card(Round.of(*project, key), files, IMAGES))


def test_front_matter_is_read_by_the_hub(project) -> None:
    data = card(project, "002", LORA).data
    assert (data.license, data.base_model, data.library_name) == ("openrail++", SDXL["source"], "diffusers")
    assert data.pipeline_tag == "text-to-image" and {"lora", "stable-diffusion-xl"} <= set(data.tags)
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert data.to_dict()["widget"] == [{"text": text, "output": {"url": path}} for path, text in IMAGES]


def test_own_base_has_its_own_license(project) -> None:
    found = card(project, "001", LORA)
    assert (found.data.license, found.data.base_model) == ("other", None)
    assert "the base model's license" in found.text and "Attachment A" not in found.text


def test_sdxl_license_lists_every_restriction(project) -> None:
    text = card(project, "002", LORA).text
    assert OPENRAIL.restrictions.count("\n- ") == 10 and f"\n{OPENRAIL.restrictions}" in text
    assert license_of("stabilityai/sdxl-turbo").id == "other"


def test_tables_have_the_evaluation_numbers(project) -> None:
    params, root = project
    text = card(project, "002", LORA).text
    rows = dict(re.findall(r"^\| (\w+) \|(.*)$", text, re.MULTILINE))
    for name in ("judge", "kid"):
        for key in ("base", "002"):
            values = read_sweep(RoundFiles(root, key))[str(params.evaluate.guidance_scale)]
            low, value, high = (show(values[f"{name}{end}"]) for end in ("_low", "", "_high"))
            assert f" {value} ({low} to {high}) " in rows[name]
    assert "selected the winners" in rows["reward"] and "| judge |" in f"|{rows['judge']}"
    assert "The gate says: pass" in text and "| at least 0.400 | passed |" in text
    assert read_lineage(RoundFiles(root, "002"))["adapter"] in text


def test_prompts_are_escaped(project) -> None:
    text = card(project, "002", LORA).text
    assert "<script>" not in text and "\\<script\\>" in text
    assert cell("a\n|b| ![x](y)") == r"a \|b\| \!\[x\](y)"


def test_merged_pipeline_has_no_lora(project) -> None:
    found = card(project, "002", {"merged": "merged"})
    assert found.data.to_dict()["base_model_relation"] == "finetune" and "lora" not in found.data.tags
    assert "load_lora_weights" not in found.text and "folder/merged" in found.text
