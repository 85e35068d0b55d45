"""Checks of prompts and reference images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from srpo.config.loader import Params
from srpo.config.schema import INCEPTION, MIN_REFERENCE_IMAGES, ModelParams
from srpo.data.prompt_draw import Draw
from srpo.data.prompts import Prompt, check_disjoint, load_prompts, normalize
from srpo.errors import UserError
from srpo.models.tokenizer import load_tokenizer, num_tokens, text_read, token_limit
from srpo.preflight import CheckResult
from srpo.sampling.sizes import untrained_sizes

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

FEW_PROMPTS = 100
FID_IMAGES = 10_000


def check_prompts(params: Params, root: Path) -> tuple[list[CheckResult], tuple[list[Prompt], list[Prompt]] | None]:
    """Check both prompt files.

    Returns:
        One result per file, and one for the two together if both are readable; the train and eval prompts, or None if a
        file is not readable.
    """
    tokenizer = _find_tokenizer(params, root)
    results: list[CheckResult] = []
    files: list[list[Prompt]] = []
    for name, path in params.prompts.model_dump().items():
        try:
            prompts = load_prompts(root / path)
        except UserError as error:
            results.append(CheckResult(f"prompts.{name}", "fail", str(error)))
        else:
            results.append(_check_texts(f"prompts.{name}", prompts, params.model, tokenizer))
            files.append(prompts)
    if len(files) < 2:
        return results, None
    train, held_out = files
    read = text_read(params.model, tokenizer) if tokenizer else lambda text: None
    draws = _check_draws(params, root, train)
    results += [_check_disjoint(train, held_out, read), *draws]
    if problem := untrained_sizes(train, params.generate, held_out, params.evaluate):
        results.append(CheckResult("evaluate.sizes", "warn", problem))
    return results, (train, held_out)


def check_reference(params: Params, root: Path) -> CheckResult:
    """Read every image of the reference set, and check that there are enough."""
    from srpo.data.image_files import check_images

    key, name = "evaluate.reference", params.evaluate.reference
    try:
        count = check_images(root / name)
    except UserError as error:
        return CheckResult(key, "fail", str(error))
    if count < MIN_REFERENCE_IMAGES:
        return CheckResult(key, "fail", f"{name}: {count} images; at least {MIN_REFERENCE_IMAGES} are required")
    if count < FID_IMAGES and params.evaluate.features == INCEPTION:
        text = f"{count} images; FID is comparable with published values only from {FID_IMAGES} images on"
        return CheckResult(key, "warn", f"{text}; use it to compare rounds; KID and CMMD are unbiased")
    return CheckResult(key, "ok", f"{count} images")


def _check_texts(
    key: str, prompts: Sequence[Prompt], model: ModelParams, tokenizer: CLIPTokenizer | None
) -> CheckResult:
    duplicates = len(prompts) - len({normalize(prompt.prompt) for prompt in prompts})
    warnings, notes = [], []
    if duplicates:
        warnings.append(f"{duplicates} duplicate texts: remove them")
    if tokenizer:
        limit = token_limit(tokenizer)
        counts = [(prompt.id, num_tokens(tokenizer, prompt.prompt)) for prompt in prompts]
        too_long = [(name, tokens) for name, tokens in counts if tokens > limit]
        if too_long:
            name, tokens = too_long[0]
            found = f"{len(too_long)} longer than the {limit} tokens that CLIP reads"
            if model.long_prompts == "cut":
                warnings.append(f"{found}, the rest is cut off (model.long_prompts): {name} has {tokens}")
            else:
                notes.append(f"{found}, encoded in chunks: {name} has {tokens}")
        else:
            notes.append(f"none longer than {limit} tokens")
    else:
        notes.append("length in tokens not checked: the base model's tokenizer is not on this machine yet")
    if len(prompts) < FEW_PROMPTS:
        warnings.append("use hundreds of held-out prompts" if key.endswith("eval") else "use thousands of prompts")
    text = "; ".join([f"{len(prompts)} prompts", *warnings, *notes])
    return CheckResult(key, "warn" if warnings else "ok", text)


def _check_draws(params: Params, root: Path, pool: Sequence[Prompt]) -> list[CheckResult]:
    """Check what rounds draw from the pool, or import; return problems only."""
    results = []
    for key in params.rounds:
        settings = params.for_round(key).generate
        if settings.candidates:
            if not (root / settings.candidates).is_dir():
                text = f"{settings.candidates}: no such folder; `dvc pull` restores it if it is under DVC"
                results.append(CheckResult(f"rounds.{key}.generate.candidates", "fail", text))
            continue
        fitting = sum(Draw(None, settings.tags).fits(prompt) for prompt in pool)
        if not fitting:
            text = f"no prompt of {params.prompts.train} has these tags: change them"
            results.append(CheckResult(f"rounds.{key}.generate.tags", "fail", text))
        elif fitting < (settings.prompts_per_round or 0):
            text = f"{settings.prompts_per_round}, and only {fitting} prompts fit: the round takes them all"
            results.append(CheckResult(f"rounds.{key}.generate.prompts_per_round", "warn", text))
    return results


def _find_tokenizer(params: Params, root: Path) -> CLIPTokenizer | None:
    """Load the base model's tokenizer; None if it is not on this machine."""
    try:
        return load_tokenizer(params.model, root, local_only=True)
    except UserError:
        return None


def _check_disjoint(
    train: Sequence[Prompt], held_out: Sequence[Prompt], read: Callable[[str], str | None]
) -> CheckResult:
    try:
        check_disjoint(train, held_out, read)
    except UserError as error:
        return CheckResult("prompts", "fail", str(error))
    return CheckResult("prompts", "ok", "train and eval share no text")
