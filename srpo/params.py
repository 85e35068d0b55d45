"""The typed, validated view of `params.yaml`.

Every key has a type, a range and one line that says what it is. What is under `runtime` and `tracking`
may change without changing any result, so no DVC stage depends on it; everything else is provenance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from srpo import rounds
from srpo.errors import UserError
from srpo.rewards import FAMILIES, find_family

PARAMS_FILE = "params.yaml"
STAGES_WITH_OVERRIDES = ("generate", "select", "train")
INCEPTION = "inception"

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Guidance = Annotated[float, Field(ge=1, le=30)]
Pixels = Annotated[int, Field(ge=8, le=4096, multiple_of=8)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors and nothing is silently converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class ModelParams(Section):
    """The base model, in diffusers' SDXL layout."""

    base: str = Field(min_length=1, description="Hub id or local folder of the base pipeline")
    revision: str | None = Field(None, description="Hub revision (commit hash); pin it for Hub ids")
    variant: str | None = Field(None, description="weight file variant, such as fp16")


class PromptParams(Section):
    """Prompt files: one JSON object a line with `id`, `prompt` and optional `tags`."""

    train: str = Field(description="prompts that candidates are made for")
    eval: str = Field(description="held-out prompts; sharing one with `train` is an error")


class GenerateParams(Section):
    """How candidates are sampled."""

    candidates_per_prompt: int = Field(ge=2, le=1024, description="N of best-of-N")
    num_inference_steps: int = Field(ge=1, le=1000, description="denoising steps per candidate")
    guidance_scale: Guidance = Field(description="classifier-free guidance; 1 is unguided")
    height: Pixels = Field(description="pixels")
    width: Pixels = Field(description="pixels")
    prompts_per_shard: PositiveInt = Field(32, description="prompts in one parquet shard; also the unit of resume")


class RewardParams(Section):
    """One reward model. Those with role `select` choose winners; those with role `judge` never do."""

    kind: str = Field(min_length=1, description="a family of docs/rewards.md, or package.module:Class of your own")
    model: str | None = Field(
        None, min_length=1, description="Hub id, local folder or file; left out: the family's published model"
    )
    revision: str | None = Field(
        None, description="Hub revision (commit hash); of a class of your own, its version: change it to rescore"
    )
    role: Literal["select", "judge"] = Field(description="selects winners, or judges rounds")
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="share in the selection score")

    @model_validator(mode="before")
    @classmethod
    def _published_model(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("kind"), str) or value.get("model") is not None:
            return value
        try:
            family = find_family(value["kind"])
        except UserError:
            return value  # named by the whole file's validation, with its key
        return value | {"model": family.model, "revision": value.get("revision") or family.revision}


class SelectParams(Section):
    """Which candidates become winners."""

    top_fraction: Fraction = Field(1.0, description="keep this share of prompts, largest margins first")
    min_margin: Annotated[float, Field(ge=0)] = Field(
        0.0, description="drop prompts whose winner beats its prompt's mean by less (selection score units)"
    )
    combine: Literal["zscore", "rank", "beats_mean"] = Field(
        "zscore",
        description="how several selecting rewards decide: weighted sum of z-scores within the prompt, weighted mean"
        " rank, or z-scores among the candidates that beat the prompt's mean on every one",
    )


class TrainParams(Section):
    """LoRA fine-tuning on the winners' latents."""

    rank: int = Field(ge=1, le=1024, description="LoRA rank; a round inherits its parent's adapter, so it stays")
    target_modules: list[str] = Field(
        default=["to_q", "to_k", "to_v", "to_out.0"], min_length=1, description="UNet modules that get LoRA"
    )
    steps: PositiveInt = Field(description="optimizer steps")
    batch_size: PositiveInt = Field(description="winners per optimizer step")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(description="peak AdamW learning rate")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="linear warm-up")
    lr_schedule: Literal["constant", "cosine"] = Field("constant", description="after warm-up")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW weight decay")
    snr_gamma: Annotated[float, Field(gt=0)] | None = Field(None, description="min-SNR weighting; null is off")
    caption_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="share of samples trained on the empty prompt, so that guidance keeps working"
    )
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="gradient clipping")


class EvaluateParams(Section):
    """The fixed examination every round takes."""

    images_per_prompt: PositiveInt = Field(description="images per eval prompt and guidance scale")
    num_inference_steps: int = Field(ge=1, le=1000, description="denoising steps")
    guidance_scales: list[Guidance] = Field(min_length=1, description="the sweep; reward alone favours high values")
    guidance_scale: Guidance = Field(description="the one of the sweep whose numbers are reported")
    height: Pixels = Field(description="pixels")
    width: Pixels = Field(description="pixels")
    reference: str = Field(description="parquet file or folder of reference images for FID, KID and CMMD")
    features: str = Field(description="what makes FID's and KID's image features: `inception`, or a judge's name")
    clip_features: str | None = Field(
        None, description="the judge whose image embeddings CMMD and diversity use; null takes `features`"
    )
    samples: PositiveInt = Field(16, description="eval prompts whose pictures are kept")

    @model_validator(mode="after")
    def _reported_is_in_sweep(self) -> EvaluateParams:
        if self.guidance_scale not in self.guidance_scales:
            raise ValueError(f"guidance_scale {self.guidance_scale} must be one of guidance_scales")
        return self

    @property
    def clip_name(self) -> str:
        """Name of the judge whose image embeddings CMMD and diversity use."""
        return self.clip_features or self.features


class GateParams(Section):
    """What a round must show to pass. Judges and pictures decide, never the selecting reward."""

    min_judge_win_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="lower end of the 95 % interval of each judge's win rate against base, at least"
    )
    max_fid_ratio: Annotated[float, Field(gt=0)] = Field(1.0, description="FID over base's, at most")
    max_kid_increase: float | None = Field(0.0, description="KID minus base's, at most; null asks for nothing")
    min_diversity_ratio: Annotated[float, Field(ge=0)] = Field(0.5, description="diversity over base's, at least")
    max_looks_drift: Annotated[float, Field(gt=0)] | None = Field(
        1.0,
        description="shift of mean saturation, contrast, edges and colour entropy from base's, in base's standard "
        "deviations over pictures, at most; null asks for nothing",
    )


class RuntimeParams(Section):
    """Hardware. Changing it changes no result, so no stage depends on it."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes CUDA when it is there")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: bfloat16 on CUDA")
    batch_size: PositiveInt = Field(16, description="images denoised at once; halved where memory runs out")


class TrackingParams(Section):
    """MLflow."""

    uri: str = Field("sqlite:///mlflow.db", description="MLflow tracking URI")
    experiment: str = Field("srpo", min_length=1, description="MLflow experiment")
    campaign: str = Field("campaign", min_length=1, description="name of the run that spans all rounds")


class RoundParams(Section):
    """One node of the tree of rounds. Overrides stand per stage, `{}` for none: DVC tracks each by its key."""

    parent: str = Field(min_length=1, description="`base` or the name of another round")
    generate: dict[str, Any] = Field(description="overrides of `generate` in this round")
    select: dict[str, Any] = Field(description="overrides of `select` in this round")
    train: dict[str, Any] = Field(description="overrides of `train` in this round")


class Params(Section):
    """All of params.yaml."""

    seed: int = Field(ge=0, lt=2**31, description="root of every random number")
    rounds: dict[str, RoundParams] = Field(min_length=1, description="the tree of rounds")
    model: ModelParams
    prompts: PromptParams
    generate: GenerateParams
    rewards: dict[str, RewardParams] = Field(min_length=1, description="by name; the names become columns")
    select: SelectParams
    train: TrainParams
    evaluate: EvaluateParams
    gate: GateParams = GateParams()
    runtime: RuntimeParams = RuntimeParams()
    tracking: TrackingParams = TrackingParams()

    @field_validator("rounds", mode="after")
    @classmethod
    def _rounds_are_a_tree(cls, value: dict[str, RoundParams]) -> dict[str, RoundParams]:
        rounds.check_tree({key: node.parent for key, node in value.items()})
        return value

    @model_validator(mode="after")
    def _rewards_fit(self) -> Params:
        for name, spec in self.rewards.items():
            try:
                find_family(spec.kind)
            except UserError as error:
                raise ValueError(f"rewards.{name}.kind: {error}") from None
            if spec.kind in FAMILIES and spec.model is None:
                raise ValueError(f"rewards.{name}.model: missing; {spec.kind} has no published model, so name one")
            if not name.isidentifier() or name in RESERVED_COLUMNS:
                raise ValueError(f"rewards.{name}: not usable as a column name; rename the reward")
        roles = {spec.role for spec in self.rewards.values()}
        if roles != {"select", "judge"}:
            raise ValueError("rewards: needs at least one with role select and one with role judge")
        if self.evaluate.features != INCEPTION:
            self._must_judge("features", self.evaluate.features)
        elif self.evaluate.clip_features is None:
            raise ValueError("evaluate.clip_features: name a judge, since evaluate.features is no CLIP's")
        self._must_judge("clip_features", self.evaluate.clip_name)
        return self

    def _must_judge(self, key: str, name: str) -> None:
        if name not in self.rewards or self.rewards[name].role != "judge":
            raise ValueError(f"evaluate.{key}: {name!r} is not a reward with role judge")

    def for_round(self, key: str) -> Params:
        """These params with the round's overrides applied.

        Raises:
            UserError: the round is not in params.yaml, or an override does not fit its section.
        """
        if key not in self.rounds:
            raise UserError(f"rounds.{key}: no such round in {PARAMS_FILE}; it has {', '.join(self.rounds)}")
        node, merged = self.rounds[key], {}
        for stage in STAGES_WITH_OVERRIDES:
            section = getattr(self, stage)
            values = section.model_dump() | getattr(node, stage)
            try:
                merged[stage] = type(section).model_validate(values)
            except ValidationError as error:
                raise UserError(f"{PARAMS_FILE}: {_first_problem(error, ('rounds', key, stage))}") from None
        return self.model_copy(update=merged)

    def reward_names(self, role: str) -> list[str]:
        """Names of the rewards with this role (`select` or `judge`), in file order."""
        return [name for name, spec in self.rewards.items() if spec.role == role]


RESERVED_COLUMNS = {
    "candidate_id", "prompt_id", "prompt", "index", "seed", "image", "latents", "steps", "guidance",
    "margin", "weight", "loser_id", "selection_score", "rejected", "file",
    "images", "fid", "kid", "cmmd", "diversity", "drift", "drift_kid", "verdict", "finding",
    "saturation", "contrast", "edge_density", "colour_entropy", INCEPTION,
}  # fmt: skip


def load_params(path: Path | str = PARAMS_FILE) -> Params:
    """Read and validate a params file, every round's overrides included.

    Raises:
        UserError: one line naming the first wrong key, what is wrong and what would be right.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    path = Path(path)
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run srpo from the folder that holds params.yaml") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except YAMLError as error:
        raise UserError(f"{path}: not valid YAML; {_yaml_problem(error)}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must be a mapping of sections, found {type(raw).__name__}")
    for key in raw.get("rounds") or {}:
        if not isinstance(key, str):
            raise UserError(f'{path}: rounds: the key {key!r} is not text; quote it, as in "{key:>03}"')
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_problem(error)}") from None
    for key in params.rounds:
        params.for_round(key)
    return params


def _first_problem(error: ValidationError, prefix: tuple[str, ...] = ()) -> str:
    problem = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in (*prefix, *problem["loc"]))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] == "missing":
        hint = "; write {} to override nothing" if key.startswith("rounds.") else "; add it"
        return f"{key}: missing{hint}{more}"
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; remove it or mend its spelling{more}"
    message = problem["msg"].removeprefix("Value error, ")
    found = "" if problem["type"] == "value_error" else f", found {problem['input']!r:.80}"
    return f"{key}: {message}{found}{more}" if key else f"{message}{more}"


def _yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}: " if mark else ""
    return place + " ".join(str(getattr(error, "problem", None) or error).split())
