"""`srpo check`: what would go wrong or cost too much, told before hours are spent. Loads no weights and no torch."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from srpo.config.loader import Params
from srpo.config.schema import INCEPTION
from srpo.data.prompts import Prompt, check_disjoint, load_prompts
from srpo.errors import UserError
from srpo.preflight import cost as estimate
from srpo.preflight.services import Finding, find_mlflow, find_models, find_prefect, find_remote
from srpo.rounds import BASE, RoundFiles
from srpo.runtime.extras import missing

CLIP_TOKENS = 77
FEW_PROMPTS = 100
FID_PICTURES = 10_000
FEWEST_REFERENCES = 3
SDXL_BLOCKS = [320, 640, 1280]
LINKS = {"hardlink", "symlink"}
CLIP_PIECES = re.compile(r"<\|\w+\|>|'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+|_+", re.IGNORECASE)
PIECE_TOKENS = 1.2  # of CLIP's byte pairs in an English word or sign, on the mean


def check_project(params: Params, root: Path) -> list[Finding]:
    """All findings, in the order in which to mend them. Writes nothing but one object to the remote, and removes it."""
    train, eval_ = (_prompts(key, root / path) for key, path in params.prompts.model_dump().items())
    found = [Finding("params.yaml", "ok", f"valid; {len(params.rounds)} rounds"), *find_models(params, root)]
    for (key, _), prompts in zip(params.prompts.model_dump().items(), (train, eval_), strict=True):
        found += [prompts] if isinstance(prompts, Finding) else [_sane(f"prompts.{key}", prompts, params, root)]
    if isinstance(train, list) and isinstance(eval_, list):
        found += _disjoint(train, eval_)
    found += [_reference(params, root), *_repositories(root), find_mlflow(params.tracking.uri), find_prefect()]
    if isinstance(train, list) and isinstance(eval_, list):
        found += _costs(params, root, len(train), len(eval_))
    return found


def _prompts(key: str, path: Path) -> list[Prompt] | Finding:
    try:
        return load_prompts(path)
    except UserError as error:
        return Finding(f"prompts.{key}", "fail", str(error))


def _sane(what: str, prompts: Sequence[Prompt], params: Params, root: Path) -> Finding:
    texts = Counter(" ".join(prompt.prompt.casefold().split()) for prompt in prompts)
    again = len(prompts) - len(texts)
    count, limit, how = _token_counter(params, root)
    long = [(prompt.id, count(prompt.prompt)) for prompt in prompts]
    long = [(name, tokens) for name, tokens in long if tokens > limit]
    said, state = [f"{len(prompts)} prompts"], "ok"
    if again:
        said.append(f"{again} texts stand there more than once: remove them")
    if long:
        said.append(
            f"{len(long)} longer than the {limit} tokens CLIP reads ({how}): their ends are lost,"
            f" such as {long[0][0]} with {long[0][1]}"
        )
    else:
        said.append(f"none longer than {limit} tokens ({how})")
    if few := len(prompts) < FEW_PROMPTS:
        said.append("real work wants hundreds held out" if what.endswith("eval") else "real work wants thousands")
    if again or long or few:
        state = "warn"
    return Finding(what, state, "; ".join(said))


def _token_counter(params: Params, root: Path) -> tuple[Callable[[str], int], int, str]:
    """What counts a prompt's tokens, start and end included; the limit; and how it counts."""
    file = _model_file(params, root, "tokenizer/tokenizer.json") or _model_file(
        params, root, "tokenizer/vocab.json", "tokenizer/merges.txt"
    )
    if file:
        from transformers import CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(file.parent)
        limit = min(tokenizer.model_max_length, CLIP_TOKENS)
        tokenizer.model_max_length = 10**9  # else it warns of every long prompt
        return lambda text: len(tokenizer(text).input_ids), limit, "counted"
    return (
        lambda text: 2 + round(PIECE_TOKENS * len(CLIP_PIECES.findall(text))),
        CLIP_TOKENS,
        "estimated; the tokenizer is not here yet",
    )


def _model_file(params: Params, root: Path, *names: str) -> Path | None:
    """The first of these files of the base model, when all are here or in the Hub's cache."""
    model, paths = params.model, []
    for name in names:
        path: Path | str | object | None = root / model.base / name
        if not (root / model.base).exists():
            from huggingface_hub import try_to_load_from_cache
            from huggingface_hub.errors import HFValidationError

            try:
                path = try_to_load_from_cache(model.base, name, revision=model.revision)
            except HFValidationError:
                return None
        if not isinstance(path, str | Path) or not Path(path).is_file():
            return None
        paths.append(Path(path))
    return paths[0]


def _disjoint(train: Sequence[Prompt], held_out: Sequence[Prompt]) -> list[Finding]:
    try:
        check_disjoint(train, held_out)
    except UserError as error:
        return [Finding("prompts", "fail", str(error))]
    return [Finding("prompts", "ok", "no text stands in both files")]


def _reference(params: Params, root: Path) -> Finding:
    import pyarrow as pa
    import pyarrow.parquet as pq

    key, path = "evaluate.reference", root / params.evaluate.reference
    parts = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    try:
        count = sum(pq.read_metadata(part).num_rows for part in parts)
        if any("image" not in pq.read_schema(part).names for part in parts):
            return Finding(key, "fail", f"{params.evaluate.reference}: a file without the column `image`")
    except (OSError, pa.ArrowInvalid) as error:
        return Finding(key, "fail", f"{params.evaluate.reference}: can't be read ({type(error).__name__})")
    if count < FEWEST_REFERENCES:
        return Finding(key, "fail", f"{params.evaluate.reference}: {count} pictures; it needs parquet files of many")
    if count < FID_PICTURES and params.evaluate.features == INCEPTION:
        text = f"{count} pictures; FID needs {FID_PICTURES} for numbers that compare with others'"
        return Finding(key, "warn", f"{text}; here it compares rounds alone, KID and CMMD are unbiased")
    return Finding(key, "ok", f"{count} pictures")


def _repositories(root: Path) -> list[Finding]:
    found = [_git(root)]
    if line := missing("dvc"):
        return [*found, Finding("dvc", "fail", f"a project {line}")]
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    try:
        repo = Repo(str(root))
    except NotDvcRepoError:
        return [*found, Finding("dvc", "fail", "no DVC repository here; `srpo init` or `dvc init` makes one")]
    with repo:
        found.append(
            Finding("dvc", "ok", "data/ is tracked")
            if (root / "data.dvc").is_file()
            else Finding("dvc", "warn", "data/ is not tracked, so no commit can bring it back; `dvc add data`")
        )
        return [*found, find_remote(repo)]


def _git(root: Path) -> Finding:
    try:
        done = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        return Finding("git", "warn", "not installed; dvc.lock, the record of every round, is kept by nobody")
    if done.returncode != 0:
        return Finding("git", "warn", "no Git repository; dvc.lock, the record of every round, is kept by nobody")
    if changed := len(done.stdout.splitlines()):
        return Finding("git", "warn", f"{changed} files not committed; commit them, so that rounds name what made them")
    return Finding("git", "ok", "all committed")


def _costs(params: Params, root: Path, train: int, held_out: int) -> list[Finding]:
    config = _model_file(params, root, "unet/config.json")
    if config and json.loads(config.read_text(encoding="utf-8")).get("block_out_channels") != SDXL_BLOCKS:
        return [Finding("cost", "ok", "not estimated: the formulas are SDXL's, and this base is of another size")]
    return [_memory(params), _disk(params, root, train, held_out), *_time(params, train, held_out)]


def _memory(params: Params) -> Finding:
    devices, key = _devices(), next(iter(params.rounds))
    needs = {"sampling": estimate.sampling_gb(params), "training": estimate.training_gb(params, key)}
    said = ", ".join(f"{name} {need:.0f} GB" for name, need in needs.items()) + " (estimates, a quarter either way)"
    if not devices:
        return Finding("memory", "warn", f"{said}; no GPU seen here to compare with")
    name, room = devices[0]
    for stage, need in needs.items():
        if need > room:
            lower = "batch_size" if stage == "sampling" else "train_batch_size, or set gradient_checkpointing"
            return Finding("memory", "warn", f"{said}; {name} has {room:.0f} GB: lower runtime.{lower}")
    return Finding("memory", "ok", f"{said}; {name} has {room:.0f} GB")


def _devices() -> list[tuple[str, float]]:
    """Name and GB of each GPU. Asked of the driver's tool: torch takes seconds to import and a context to ask."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.rsplit(",", 1) for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [(name.strip(), float(mib) * 2**20 / estimate.GB) for name, mib in rows if mib.strip().isdigit()]


def _disk(params: Params, root: Path, train: int, held_out: int) -> Finding:
    todo = [key for key in params.rounds if not RoundFiles(root, key).evaluation.exists()]
    each = {key: estimate.round_bytes(params, key, train, held_out) / estimate.GB for key in todo}
    copies, hint = (1, "") if LINKS & _cache_types(root) else (2, ", with a copy of each file in DVC's cache")
    need, free = copies * sum(each.values()), shutil.disk_usage(root).free / estimate.GB
    said = f"{need:.0f} GB for {len(todo)} rounds to come{hint} (PNGs of 1.5 MB), {free:.0f} GB free"
    if need > free:
        links = "; `dvc config cache.type hardlink,symlink` spares the copy" if copies > 1 else ""
        return Finding("disk", "fail", f"{said}: make room or lower generate.candidates_per_prompt{links}")
    return Finding("disk", "ok", said)


def _cache_types(root: Path) -> set[str]:
    if missing("dvc"):
        return set()
    from dvc.config import Config, ConfigError

    try:
        return set(Config(str(root / ".dvc"))["cache"].get("type") or [])
    except (ConfigError, KeyError, OSError):
        return set()


def _time(params: Params, train: int, held_out: int) -> list[Finding]:
    devices = _devices()
    named = [devices[0][0]] if devices and estimate.peak_tflops(devices[0][0]) else list(estimate.EXAMPLES)
    assumed = f"at {estimate.SHARE:.0%} of the bf16 peak, assumed"
    costs = {key: estimate.round_cost(params, key, train, held_out) for key in params.rounds}
    measured = next(iter(costs.values())).evaluate
    found = []
    for key, cost in {BASE: estimate.RoundCost(0, 0, measured), **costs}.items():
        hours = ", ".join(f"{name} {cost.hours(estimate.peak_tflops(name)):.1f}" for name in named)
        shares = (f"{stage} {getattr(cost, stage) / cost.total:.0%}" for stage in ("generate", "train", "evaluate"))
        found.append(Finding(f"round {key}", "ok", f"GPU-hours {assumed}: {hours} ({', '.join(shares)})"))
    return found
