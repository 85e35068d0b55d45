"""Checkpoints that are wrong, damaged or hostile: one line, nothing written, and no code of theirs runs."""

from __future__ import annotations

import ast
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from srpo import cli
from tests.faults.project import Change, content, param
from tests.faults.test_bad_inputs import cut, refused, removed

REPO = Path(__file__).parents[2]
UNET, VAE = "data/base/unet/diffusion_pytorch_model", "data/base/vae/diffusion_pytorch_model"
TEXT, CLIP = "data/base/text_encoder/model", "data/reward/model"
ADAPTER = "rounds/001/adapter/pytorch_lora_weights"
MARK = "payload-ran"


class Payload:
    """What a hostile pickle holds: whoever unpickles it leaves a mark."""

    def __reduce__(self):
        return exec, (f"open({MARK!r}, 'w').close()",)


def hostile(*names: str) -> Change:
    """Write a hostile checkpoint under these names, in the form that torch.save writes and as a bare pickle."""

    def change(root: Path) -> None:
        for number, name in enumerate(names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            if number % 2:
                (root / name).write_bytes(pickle.dumps({"weight": Payload()}))
            else:
                torch.save({"weight": Payload()}, root / name)

    return change


def swapped(name: str, *pickles: str) -> Change:
    """A hostile pickle in place of a safetensors file."""
    return lambda root: (removed(f"{name}.safetensors")(root), hostile(*pickles)(root))


def without(name: str, part: str) -> Change:
    """Leave tensors whose names hold `part` out of a safetensors file."""

    def change(root: Path) -> None:
        path = root / f"{name}.safetensors"
        tensors = load_file(path)
        kept = {key: value for key, value in tensors.items() if part not in key}
        assert 0 < len(kept) < len(tensors)
        save_file(kept, path, metadata={"format": "pt"})

    return change


def edited(name: str, **values: object) -> Change:
    """Set keys of a JSON file."""

    def change(root: Path) -> None:
        found = json.loads((root / name).read_text()) | values
        (root / name).write_text(json.dumps(found))

    return change


def coded(name: str, **values: object) -> Change:
    """Set keys of a JSON file and put code that leaves a mark beside it, where libraries look for a model's own."""

    def change(root: Path) -> None:
        edited(name, **values)(root)
        code = f"open({MARK!r}, 'w').close()\nclass Evil: pass\n"
        for place in ("", "unet/", "text_encoder/"):
            content(f"{Path(name).parent}/{place}evil.py", code)(root)

    return change


BASE: dict[str, tuple[Change, str]] = {
    "no folder": (param("model/base", "data/nowhere"), "model.base: "),
    "a reward's folder": (param("model/base", "data/reward"), "model.base: can't load 'data/reward' as"),
    "another VAE that is a CLIP": (param("model/vae", "data/reward"), "model.vae: can't load 'data/reward' as a VAE"),
    "no index": (removed("data/base/model_index.json"), "model.base: "),
    "index not JSON": (content("data/base/model_index.json", "{"), "model.base: "),
    "config not JSON": (content("data/base/unet/config.json", "{"), "model.base: "),
    "another size": (edited("data/base/unet/config.json", cross_attention_dim=48), "model.base: can't load"),
    "another kind of network": (
        edited("data/base/model_index.json", unet=["diffusers", "AutoencoderKL"]), "model.base: ",
    ),
    "no such variant": (param("model/variant", "fp16"), "model.variant: "),
    "a UNet cut": (cut(f"{UNET}.safetensors"), "model.base: "),
    "a UNet of no bytes": (content(f"{UNET}.safetensors", b""), "model.base: "),
    "a UNet that lacks layers": (without(UNET, "down_blocks.0"), "model.base: "),
    "a VAE that lacks layers": (without(VAE, "decoder.conv_in"), "model.base: "),
    "a text encoder that lacks layers": (without(TEXT, "layers.1"), "model.base: "),
    "a text encoder cut": (cut(f"{TEXT}.safetensors"), "model.base: "),
    "a pickled UNet": (swapped(UNET, f"{UNET}.bin", f"{UNET}.ckpt"), "model.base: "),
    "a pickled VAE": (swapped(VAE, f"{VAE}.bin", f"{VAE}.pt"), "model.base: "),
    "a pickled text encoder": (
        swapped(TEXT, "data/base/text_encoder/pytorch_model.bin"), "model.base: ",
    ),
    "a pickle as safetensors": (hostile(f"{UNET}.safetensors"), "model.base: "),
    "a bare pickle as safetensors": (hostile("x", f"{UNET}.safetensors"), "model.base: "),
    "a UNet of its own code": (coded("data/base/model_index.json", unet=["evil", "Evil"]), "model.base: "),
    "a pipeline of its own code": (coded("data/base/model_index.json", _class_name=["evil", "Evil"]), "model.base: "),
    "text of its own code": (coded("data/base/model_index.json", text_encoder=["evil", "Evil"]), "model.base: "),
}  # fmt: skip


@pytest.mark.parametrize("name", BASE)
def test_a_bad_base_model(name: str, world: Path, capfd: pytest.CaptureFixture) -> None:
    change, expected = BASE[name]
    assert cli.run(["base"]) == 0
    change(world)
    cli.run(["base"])  # else it is refused for being another than the one written down
    refused(world, ["generate", "001"], expected, capfd)
    assert not list(world.rglob(MARK)), "its code ran"


REWARDS: dict[str, tuple[str, Change, str]] = {
    "no model": ("clip=data/nowhere", lambda root: None, "rewards.clip: "),
    "a base model": ("clip=data/base", lambda root: None, "rewards.clip: can't load"),
    "a CLIP cut": ("clip=data/reward", cut(f"{CLIP}.safetensors"), "rewards.clip: can't load"),
    "a CLIP that lacks layers": ("clip=data/reward", without(CLIP, "vision_model.encoder"), "rewards.clip: can't load"),
    "a CLIP of another size": (
        "clip=data/reward", edited("data/reward/config.json", projection_dim=8), "rewards.clip: can't load",
    ),
    "a pickled CLIP": (
        "clip=data/reward", swapped(CLIP, "data/reward/pytorch_model.bin"), "rewards.clip: can't load",
    ),
    "a pickle as a CLIP's safetensors": (
        "pickscore=data/reward", hostile(f"{CLIP}.safetensors"), "rewards.pickscore: can't load",
    ),
    "a pickled HPS": ("hpsv2=evil.pt", hostile("evil.pt"), "rewards.hpsv2: can't load"),
    "a bare pickle as HPS": ("hpsv2.1=evil.ckpt", hostile("x", "evil.ckpt"), "rewards.hpsv2.1: can't load"),
    "a pickled ImageReward": ("imagereward=evil", hostile("evil/ImageReward.pt"), "rewards.imagereward: can't load"),
    "a pickled head": ("aesthetic=evil.pth", hostile("evil.pth"), "rewards.aesthetic: can't load"),
    "a bare pickle as a head": ("aesthetic=evil.bin", hostile("x", "evil.bin"), "rewards.aesthetic: can't load"),
    "a head of other layers": (
        "aesthetic=head.safetensors",
        lambda root: save_file({"layers.0.weight": torch.zeros(1)}, root / "head.safetensors"),
        "rewards.aesthetic: can't load",
    ),
    "templates that are a pickle": ("templates=evil.parquet", hostile("evil.parquet"), "rewards.templates: "),
    "templates without images": ("templates=data/prompts/eval.jsonl", lambda root: None, "rewards.templates: "),
    "a model of its own code": (
        "vqascore=data/reward",
        coded("data/reward/config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil"}),
        "rewards.vqascore: can't load",
    ),
    "words of their own code": (
        "vqascore=data/reward",
        coded("data/reward/tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoProcessor": "evil.Evil"}),
        "rewards.vqascore: can't load",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REWARDS)
def test_a_bad_reward_model(name: str, world: Path, capfd: pytest.CaptureFixture) -> None:
    from PIL import Image

    reward, change, expected = REWARDS[name]
    (world / "images").mkdir()
    Image.radial_gradient("L").save(world / "images" / "a.png")
    change(world)
    refused(world, ["score-images", "images", "--prompt", "x", "--reward", reward], expected, capfd)
    assert not list(world.rglob(MARK)), "its code ran"


ADAPTERS: dict[str, tuple[Change, str]] = {
    "of nothing": (content("rounds/001/adapter/lineage.json", "{}"), "rounds/001/adapter: no weights"),
    "pickled": (hostile(f"{ADAPTER}.bin", f"{ADAPTER}.pt", f"{ADAPTER}.ckpt"), "rounds/001/adapter: no weights"),
    "a pickle as safetensors": (hostile(f"{ADAPTER}.safetensors"), f"{ADAPTER}.safetensors: "),
    "a bare pickle as safetensors": (hostile("x", f"{ADAPTER}.safetensors"), f"{ADAPTER}.safetensors: "),
    "a UNet that is a pickle": (
        hostile("rounds/001/adapter/diffusion_pytorch_model.safetensors"), "rounds/001/adapter/diffusion_pytorch_model",
    ),
    "of another model": (
        lambda root: ((root / ADAPTER).parent.mkdir(parents=True), save_file(
            {f"unet.mid_block.{part}.to_q.lora.{half}.weight": torch.zeros(shape) for part in ("a", "b")
             for half, shape in (("down", (2, 9)), ("up", (9, 2)))},
            root / f"{ADAPTER}.safetensors")),
        f"{ADAPTER}.safetensors: ",
    ),
    "of no LoRA": (
        lambda root: ((root / ADAPTER).parent.mkdir(parents=True),
                      save_file({"x": torch.zeros(1)}, root / f"{ADAPTER}.safetensors")),
        f"{ADAPTER}.safetensors: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_parent_adapter(name: str, world: Path, capfd: pytest.CaptureFixture) -> None:
    change, expected = ADAPTERS[name]
    assert cli.run(["base"]) == 0
    change(world)
    refused(world, ["generate", "002"], expected, capfd)
    assert not list(world.rglob(MARK)), "its code ran"


def test_pickle_is_not_read(world: Path) -> None:
    hostile(f"{UNET}.bin", f"{VAE}.bin", "data/base/text_encoder/pytorch_model.bin", "data/reward/pytorch_model.bin")(
        world
    )
    param("generate/candidates_per_prompt", 2)(world)
    assert cli.run(["base"]) == 0 and cli.run(["generate", "001"]) == 0 and cli.run(["score", "001"]) == 0
    assert not list(world.rglob(MARK))


def test_the_payload_would_leave_its_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hostile("a.pt", "b.pt")(tmp_path)
    torch.load("a.pt", weights_only=False)
    assert Path(MARK).exists()


UNPICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def dangers(tree: ast.AST) -> Iterator[str]:
    """What in a module could run code that is in data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"imports {name}" for name in names if name.split(".")[0] in UNPICKLING)
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in ("eval", "exec", "os.system", "torch.jit.load", "torch.hub.load", "yaml.load", "yaml.unsafe_load"):
            yield f"calls {name}"
        if name == "torch.load" and given.get("weights_only") != "True":
            yield "torch.load without weights_only"
        if given.get("trust_remote_code", "False") != "False" or given.get("allow_pickle", "False") != "False":
            yield f"{name} trusts"
        if given.get("shell", "False") != "False":
            yield f"{name} with a shell"
        if name.endswith("YAML") and given.get("typ") not in ("'safe'", "'rt'", None):
            yield "unsafe YAML"


@pytest.mark.parametrize("folder", ["srpo", "flows", "bench"])
def test_no_module_runs_code_that_is_in_data(folder: str) -> None:
    modules = sorted((REPO / folder).rglob("*.py"))
    assert modules
    found = {str(path): list(dangers(ast.parse(path.read_text(encoding="utf-8")))) for path in modules}
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from joblib import load", "torch.load(p)", "torch.load(p, weights_only=False)", "eval(x)",
     "np.load(p, allow_pickle=True)", "M.from_pretrained(m, trust_remote_code=True)", "run(c, shell=True)",
     "YAML(typ='unsafe')", "torch.jit.load(p)"],
)  # fmt: skip
def test_such_a_line_would_be_found(line: str) -> None:
    assert list(dangers(ast.parse(line)))
