"""The sections of `params.yaml`, each key with its type, its range and one line that says what it is.

What is under `runtime` and `tracking` may change without changing any result, so no DVC stage depends on it;
everything else is provenance.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from srpo.errors import UserError
from srpo.rewards.families import find_family

INCEPTION = "inception"

PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Guidance = Annotated[float, Field(ge=1, le=30)]
Pixels = Annotated[int, Field(ge=8, le=4096, multiple_of=8)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors and nothing is silently converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=(), allow_inf_nan=False)


class ModelParams(Section):
    """The base model, in diffusers' SDXL layout."""

    base: str = Field(min_length=1, description="Hub id or local folder of the base pipeline")
    revision: str | None = Field(None, description="Hub revision (commit hash); pin it for Hub ids")
    variant: str | None = Field(None, description="weight file variant, such as fp16")
    vae: str | None = Field(
        None, min_length=1, description="another VAE, such as madebyollin/sdxl-vae-fp16-fix; null is the base's own"
    )
    vae_revision: str | None = Field(None, description="Hub revision of `vae`")


class PromptParams(Section):
    """Prompt files: one JSON object a line with `id`, `prompt` and optional `tags`."""

    train: str = Field(description="prompts that candidates are made for")
    eval: str = Field(description="held-out prompts; sharing one with `train` is an error")


class Checkpoint(Section):
    """A point of the trajectory where previews are scored."""

    step: PositiveInt = Field(description="denoising steps done when the previews are made")
    keep: PositiveInt = Field(description="candidates per prompt that go on")


class EarlyRejectionParams(Section):
    """Candidates whose previews score low are given up before they are finished."""

    reward: str = Field(min_length=1, description="the reward with role select that scores the previews")
    checkpoints: list[Checkpoint] = Field(min_length=1, description="in order of steps, keeping fewer each time")
    audit_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="share of prompts whose candidates are all finished, to measure what rejection loses"
    )
    preview_scale: Literal[1, 2, 4] = Field(1, description="previews are decoded at 1/1, 1/2 or 1/4 of the size")

    @model_validator(mode="after")
    def _checkpoints_narrow(self) -> EarlyRejectionParams:
        for before, after in pairwise(self.checkpoints):
            if after.step <= before.step or after.keep >= before.keep:
                raise ValueError("checkpoints: each must come at a later step and keep fewer than the one before")
        return self


class GenerateParams(Section):
    """How candidates are sampled."""

    candidates_per_prompt: int = Field(ge=2, le=1024, description="N of best-of-N")
    num_inference_steps: int = Field(ge=1, le=1000, description="denoising steps per candidate")
    guidance_scale: Guidance = Field(description="classifier-free guidance; 1 is unguided")
    height: Pixels = Field(description="pixels")
    width: Pixels = Field(description="pixels")
    prompts_per_shard: PositiveInt = Field(32, description="prompts in one parquet shard; also the unit of resume")
    early_rejection: EarlyRejectionParams | None = Field(None, description="null finishes every candidate")

    @model_validator(mode="after")
    def _rejection_fits(self) -> GenerateParams:
        if self.early_rejection:
            first, last = self.early_rejection.checkpoints[0], self.early_rejection.checkpoints[-1]
            if last.step >= self.num_inference_steps:
                raise ValueError(f"early_rejection.checkpoints: step {last.step} is not before the last step")
            if first.keep >= self.candidates_per_prompt:
                raise ValueError(f"early_rejection.checkpoints: keep {first.keep} rejects no candidate")
        return self


class RewardParams(Section):
    """One reward model. Those with role `select` choose winners; those with role `judge` never do."""

    kind: str = Field(
        min_length=1, description="a family of docs/reference/rewards.md, or package.module:Class of your own"
    )
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
    temperature: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="draw each winner with probability proportional to exp(selection score / temperature), which keeps"
        " variety; 0 takes the best",
    )
    combine: Literal["zscore", "rank", "beats_mean"] = Field(
        "zscore",
        description="how several selecting rewards decide: weighted sum of z-scores within the prompt, weighted mean"
        " rank, or z-scores among the candidates that beat the prompt's mean on every one",
    )
    weighting: Literal["uniform", "advantage"] = Field(
        "uniform", description="winners count alike in training, or by their margin (mean weight 1)"
    )
    picks: str | None = Field(
        None,
        min_length=1,
        description="file of `srpo picks`: what people picked wins, whatever the rewards say; set it in one round",
    )


class TrainParams(Section):
    """Fine-tuning on the winners' latents."""

    method: Literal["lora", "full"] = Field("lora", description="train a LoRA, or every weight of the UNet")
    rank: int = Field(ge=1, le=1024, description="LoRA rank; a round inherits its parent's adapter, so it stays")
    target_modules: list[str] = Field(
        default=["to_q", "to_k", "to_v", "to_out.0"], min_length=1, description="UNet modules that get LoRA"
    )
    objective: Literal["sft", "dpo", "nft"] = Field(
        "sft", description="winners only; winner against loser (Diffusion-DPO); or winner and negated loser (NFT)"
    )
    dpo_beta: Annotated[float, Field(gt=0)] = Field(2000.0, description="dpo: how dear it is to leave the parent")
    nft_beta: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="nft: how far implicit policies reach")
    start: Literal["parent", "base"] = Field(
        "parent", description="go on from the parent's weights, or anew from base on all winners so far"
    )
    replay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of every batch drawn from the winners of earlier rounds on the path from base"
    )
    steps: PositiveInt = Field(description="optimizer steps")
    batch_size: PositiveInt = Field(description="winners per optimizer step, over all processes")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(description="peak AdamW learning rate")
    warmup_steps: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="linear warm-up")
    lr_schedule: Literal["constant", "cosine"] = Field("constant", description="after warm-up")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW weight decay")
    snr_gamma: Annotated[float, Field(gt=0)] | None = Field(None, description="min-SNR weighting; null is off")
    caption_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="share of samples trained on the empty prompt, so that guidance keeps working"
    )
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="gradient clipping")
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="publish the exponential moving average of the weights; null publishes the last ones"
    )
    max_loss_ratio: Annotated[float, Field(gt=1)] | None = Field(
        10.0, description="stop when the mean loss of recent steps is that many times the lowest so far; null never"
    )


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
    max_image_stat_shift: Annotated[float, Field(gt=0)] | None = Field(
        1.0,
        description="shift of mean saturation, contrast, edges and colour entropy from base's, in base's standard "
        "deviations over pictures, at most; null asks for nothing",
    )


class RuntimeParams(Section):
    """Hardware. Changing it changes no result, so no stage depends on it."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes CUDA when it is there")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: bfloat16 on CUDA")
    processes: PositiveInt = Field(1, description="processes, one a GPU, that generate and train run in")
    batch_size: PositiveInt = Field(16, description="images denoised at once; halved where memory runs out")
    train_batch_size: PositiveInt | None = Field(
        None, description="samples in one forward pass of training; gradients add up to train.batch_size; null is all"
    )
    gradient_checkpointing: bool = Field(False, description="training recomputes activations: slower, less memory")
    checkpoint_every: PositiveInt = Field(100, description="training steps between the states a killed run resumes at")
    compile: bool = Field(False, description="CUDA: compile the UNet's repeated blocks; pays off after minutes")


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
