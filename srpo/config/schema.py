"""The sections of params.yaml: each key with its type, range and a one-line description.

Keys under `runtime` and `tracking` may change without changing any result, so no DVC stage depends on them. All other
keys are part of a round's lineage.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from srpo.config.reward_families import find_family
from srpo.errors import UserError

INCEPTION = "inception"
MIN_REFERENCE_IMAGES = 3
CLUSTER = re.compile(r"local|auto|(ray://)?[A-Za-z0-9][A-Za-z0-9.-]*:[0-9]{1,5}")

PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Guidance = Annotated[float, Field(ge=1, le=30)]
Pixels = Annotated[int, Field(ge=8, le=4096, multiple_of=8)]

# classes of diffusers whose images equal those of diffusers' own pipeline, tested one by one
SchedulerName = Literal[
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "TCDScheduler", "UniPCMultistepScheduler"
]  # fmt: skip


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, and values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=(), allow_inf_nan=False)


class BaseLora(Section):
    """A LoRA that is merged into the base model."""

    path: str = Field(min_length=1, description="a .safetensors file, or a folder with one, under data/")
    scale: Annotated[float, Field(ge=-10, le=10)] = Field(1.0, description="strength of its change")


class ModelParams(Section):
    """The base model, in diffusers' SDXL layout."""

    base: str = Field(min_length=1, description="Hub id or local folder of the base pipeline")
    revision: str | None = Field(None, description="Hub revision (commit hash); pin it for Hub ids")
    variant: str | None = Field(None, description="weight file variant, such as fp16")
    vae: str | None = Field(
        None, min_length=1, description="another VAE, such as madebyollin/sdxl-vae-fp16-fix; null uses the base's"
    )
    vae_revision: str | None = Field(None, description="Hub revision of `vae`")
    long_prompts: Literal["cut", "chunk"] = Field(
        "cut",
        description="prompts longer than the 77 tokens that the text encoders read: cut them off, or encode them in"
        " chunks of 75 tokens",
    )
    scheduler: SchedulerName | None = Field(
        None, description="class of diffusers' scheduler to sample with; null is the base's own"
    )
    scheduler_config: dict[str, Any] = Field(
        default={}, description="options of the scheduler that differ from the base's, such as timestep_spacing"
    )
    fp8: bool = Field(
        False,
        description="round the weights of the UNet's attention blocks to 8 bits (float8_e4m3fn), in which a GPU keeps"
        " them: 2.9 GB instead of 5.1, and slower; a change of the base like any other",
    )
    loras: list[BaseLora] = Field(
        default=[], description="LoRAs in diffusers' or kohya's format that are part of the base, merged in this order"
    )


class PromptParams(Section):
    """Prompt files: one JSON object per line with `id`, `prompt` and optional `tags`."""

    train: str = Field(description="prompts that candidates are sampled for")
    eval: str = Field(description="held-out prompts; sharing one with `train` is an error")


class Checkpoint(Section):
    """A step of the denoising at which previews are scored."""

    step: PositiveInt = Field(description="number of denoising steps before the preview")
    keep: PositiveInt = Field(description="candidates per prompt that continue")


class EarlyRejectionParams(Section):
    """Candidates with low-scoring previews are dropped before they are finished."""

    reward: str = Field(min_length=1, description="the reward with role select that scores the previews")
    checkpoints: list[Checkpoint] = Field(min_length=1, description="in order of steps, keeping fewer each time")
    audit_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="share of prompts whose candidates are all finished, to measure the loss by early rejection"
    )
    preview_scale: Literal[1, 2, 4] = Field(
        1, description="previews are decoded at 1/1, 1/2 or 1/4 of the height and width"
    )

    @model_validator(mode="after")
    def _checkpoints_narrow(self) -> EarlyRejectionParams:
        for before, after in pairwise(self.checkpoints):
            if after.step <= before.step or after.keep >= before.keep:
                raise ValueError("checkpoints: each must have a later step and a smaller keep than the one before")
        return self


class ImageSize(Section):
    """The size of an image."""

    width: Pixels = Field(description="pixels")
    height: Pixels = Field(description="pixels")


class SamplingParams(Section):
    """Settings of sampling an image."""

    num_inference_steps: int = Field(ge=1, le=1000, description="denoising steps per image")
    guidance_scale: Guidance = Field(description="classifier-free guidance; 1 is unguided")
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="how far guided predictions are scaled back to the unguided contrast, for v-prediction bases"
    )
    negative_prompt: str | None = Field(
        None, description="what guidance moves away from, unless a prompt's line has its own; null is the empty prompt"
    )
    height: Pixels = Field(description="pixels")
    width: Pixels = Field(description="pixels")
    sizes: list[ImageSize] | None = Field(
        None,
        min_length=1,
        description="sizes that the prompts are divided among, by their ids, instead of `width` x `height`; a prompt's"
        " line with its own width and height keeps those",
    )


class GenerateParams(SamplingParams):
    """Settings of sampling candidates."""

    candidates_per_prompt: int = Field(ge=2, le=1024, description="N of best-of-N")
    prompts_per_shard: PositiveInt = Field(32, description="prompts in one parquet shard; also the unit of resume")
    candidates: str | None = Field(
        None,
        min_length=1,
        description="folder of `srpo candidates import`: images from elsewhere instead of the parent's; set it in one"
        " round",
    )
    prompts_per_round: PositiveInt | None = Field(
        None,
        description="prompts drawn from `prompts.train` in each round, none twice on a path before all were drawn;"
        " null takes all in every round",
    )
    tags: dict[str, list[str]] = Field(
        default={}, description="only prompts that have one of these values of each tag, such as {style: [photo]}"
    )
    early_rejection: EarlyRejectionParams | None = Field(None, description="null finishes every candidate")

    @model_validator(mode="after")
    def _rejection_fits(self) -> GenerateParams:
        if self.early_rejection and self.candidates:
            raise ValueError("candidates: imported images can't be rejected early; set early_rejection to null")
        if self.early_rejection:
            first, last = self.early_rejection.checkpoints[0], self.early_rejection.checkpoints[-1]
            if last.step >= self.num_inference_steps:
                raise ValueError(f"early_rejection.checkpoints: step {last.step} is not before the last step")
            if first.keep >= self.candidates_per_prompt:
                raise ValueError(f"early_rejection.checkpoints: keep {first.keep} rejects no candidate")
        return self


class RewardParams(Section):
    """A reward model. Those with role `select` select winners; those with role `judge` are held out for evaluation."""

    kind: str = Field(
        min_length=1, description="a family of docs/reference/rewards.md, or package.module:Class of your own"
    )
    model: str | None = Field(
        None, min_length=1, description="Hub id, local folder or file; the default is the family's published model"
    )
    revision: str | None = Field(
        None, description="Hub revision (commit hash); for a class of your own, its version: change it to rescore"
    )
    role: Literal["select", "judge"] = Field(description="select: selects winners; judge: evaluates rounds")
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="weight in the selection score")

    @model_validator(mode="before")
    @classmethod
    def _published_model(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("kind"), str) or value.get("model") is not None:
            return value
        try:
            family = find_family(value["kind"])
        except UserError:
            return value  # Params reports it, with the reward's name
        return value | {"model": family.model, "revision": value.get("revision") or family.revision}


class SelectParams(Section):
    """Selection of winners."""

    top_fraction: Fraction = Field(1.0, description="share of prompts to keep, those with the largest margins")
    min_margin: Annotated[float, Field(ge=0)] = Field(
        0.0, description="drop prompts whose winner exceeds the prompt's mean by less, in units of the selection score"
    )
    temperature: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="sample each winner with probability proportional to exp(selection score / temperature), which"
        " keeps diversity; 0 takes the best",
    )
    combine: Literal["zscore", "rank", "beats_mean"] = Field(
        "zscore",
        description="how several selecting rewards are combined within a prompt: weighted sum of z-scores, weighted"
        " mean rank, or sum of z-scores among the candidates above the prompt's mean in every reward",
    )
    weighting: Literal["uniform", "advantage"] = Field(
        "uniform", description="weight of winners in training: all equal, or by their margin (mean weight 1)"
    )
    picks: str | None = Field(
        None,
        min_length=1,
        description="file of `srpo picks`: what people picked wins, whatever the rewards say; set it in one round",
    )


class InitialLora(Section):
    """A LoRA to start training from, of the same rank and modules."""

    path: str = Field(min_length=1, description="a .safetensors file, or a folder with one")
    sha256: str = Field(pattern="[0-9a-f]{64}", description="of the file, so that another one reruns the training")


class TrainParams(Section):
    """Fine-tuning on the winners' latents."""

    method: Literal["lora", "full"] = Field("lora", description="train a LoRA, or all weights of the UNet")
    rank: int = Field(
        ge=1, le=1024, description="LoRA rank; the same for all rounds of a path, which continue their parent's adapter"
    )
    target_modules: list[str] = Field(
        default=["to_q", "to_k", "to_v", "to_out.0"],
        min_length=1,
        description="UNet modules that get LoRA, linear or convolutions, such as conv1 and conv2",
    )
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="LoRA's change is scaled by alpha / rank; null is the rank, a scale of 1"
    )
    use_rslora: bool = Field(False, description="scale LoRA's change by alpha / sqrt(rank) instead (rsLoRA)")
    use_dora: bool = Field(False, description="also train the magnitude of each weight's outputs (DoRA)")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the inputs of LoRA's layers that training drops"
    )
    train_text_encoder: bool = Field(
        False, description="also train a LoRA of the same rank on the attention of both text encoders"
    )
    initial_lora: InitialLora | None = Field(
        None, description="a LoRA that training starts from where it would start from base's weights"
    )
    objective: Literal["sft", "dpo", "nft"] = Field(
        "sft",
        description="winners only (SFT), winner against loser (Diffusion-DPO), or winner and negated loser (NFT)",
    )
    dpo_beta: Annotated[float, Field(gt=0)] = Field(
        2000.0, description="DPO beta: strength of the penalty for deviating from the parent"
    )
    nft_beta: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="NFT beta: step size of the implicit policies"
    )
    start: Literal["parent", "base"] = Field(
        "parent", description="continue from the parent's weights, or start from base with all winners so far"
    )
    replay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of every batch drawn from the winners of earlier rounds on the path from base"
    )
    steps: PositiveInt = Field(description="optimizer steps")
    batch_size: PositiveInt = Field(description="winners per optimizer step, summed over processes")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "prodigy"] = Field(
        "adamw", description="the 8-bit ones and prodigy need the extra `optimizers`; paged_adamw_8bit needs CUDA"
    )
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        description="peak learning rate; prodigy finds its own and takes 1"
    )
    warmup_steps: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="steps of linear warm-up")
    lr_schedule: Literal["constant", "cosine"] = Field("constant", description="after warm-up")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="decoupled weight decay")
    snr_gamma: Annotated[float, Field(gt=0)] | None = Field(
        None, description="gamma of min-SNR loss weighting; null disables it"
    )
    caption_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="share of samples trained with the empty prompt, which classifier-free guidance needs"
    )
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="gradients are clipped to this norm")
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="decay of the weights' moving average, which is published; null publishes the last weights",
    )
    max_loss_ratio: Annotated[float, Field(gt=1)] | None = Field(
        10.0,
        description="stop when the mean loss of recent steps exceeds this multiple of its minimum; null disables it",
    )
    max_winner_error_ratio: Annotated[float, Field(gt=1)] | None = Field(
        1.5,
        description="dpo, nft: stop when the winners' error of recent steps is that many times the error of the model"
        " that training started from; null never",
    )

    @model_validator(mode="after")
    def _lora_keys_fit(self) -> TrainParams:
        if self.initial_lora and self.method == "full":
            raise ValueError("initial_lora: method is full, which trains no LoRA; merge it with model.loras")
        if self.train_text_encoder and self.method == "full":
            raise ValueError("train_text_encoder: method is full, which trains all of the UNet and no LoRA")
        return self


class EvaluateParams(SamplingParams):
    """Evaluation settings, identical for every round."""

    guidance_scale: Guidance = Field(description="the scale whose metrics are reported")
    images_per_prompt: PositiveInt = Field(description="images per eval prompt and guidance scale")
    guidance_scales: list[Guidance] = Field(
        min_length=1, description="all scales that are evaluated; rewards alone favor high ones"
    )
    reference: str = Field(description="parquet file or folder of reference images for FID, KID and CMMD")
    features: str = Field(description="image features of FID and KID: `inception`, or the name of a judge")
    clip_features: str | None = Field(
        None, description="the judge whose image embeddings CMMD and diversity use; null uses `features`"
    )
    diversity_judge: str | None = Field(
        None,
        description="a judge that says what each image shows of what its prompt leaves open; diversity in tables and"
        " in the gate is then that of right images",
    )
    samples: PositiveInt = Field(16, description="number of eval prompts whose images are kept for the report")

    @model_validator(mode="after")
    def _reported_is_in_sweep(self) -> EvaluateParams:
        if self.guidance_scale not in self.guidance_scales:
            raise ValueError(f"guidance_scale {self.guidance_scale} must be one of guidance_scales")
        return self

    @property
    def clip_name(self) -> str:
        """Return the name of the judge whose image embeddings CMMD and diversity use."""
        return self.clip_features or self.features

    @property
    def diversity_name(self) -> str:
        """Return the metric that tables and the gate show as diversity."""
        return "open_diversity" if self.diversity_judge else "diversity"


class GateParams(Section):
    """Limits that a round must keep to pass. They apply to judges, people and image metrics, never to what selects."""

    min_judge_win_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="minimum of each judge's win rate against base (lower end of the 95 % interval)"
    )
    max_fid_ratio: Annotated[float, Field(gt=0)] = Field(1.0, description="maximum of FID divided by base's")
    max_kid_increase: float | None = Field(0.0, description="maximum of KID minus base's; null disables the rule")
    min_diversity_ratio: Annotated[float, Field(ge=0)] = Field(
        0.5, description="minimum of diversity divided by base's; of `open_diversity` with a `diversity_judge`"
    )
    max_missing_scores: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="maximum share of a judge's scores that are NaN or infinite, which are left out of its mean"
    )
    max_image_stat_shift: Annotated[float, Field(gt=0)] | None = Field(
        1.0,
        description="maximum shift of mean saturation, contrast, edge density and color entropy from base's, in base's"
        " standard deviations over images; null disables the rule",
    )
    min_human_win_rate: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="minimum of people's win rate against base (lower end of the 95 % interval), for rounds with"
        " `min_human_votes` votes; null disables the rule",
    )
    min_human_votes: PositiveInt = Field(50, description="votes against base that a judgement by people needs")
    require_human_votes: bool = Field(
        False, description="promote no round, however it passed, that has fewer than `min_human_votes` votes"
    )
    votes: dict[str, str] = Field(
        default={}, description="by round, the file of `srpo votes --freeze`: the votes that count"
    )


class RuntimeParams(Section):
    """Hardware settings. They change no result, so no stage depends on them."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto uses CUDA if available")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto is bfloat16 on CUDA and float32 on a CPU"
    )
    processes: PositiveInt = Field(
        1,
        description="processes, one per GPU, of generate, score, train and evaluate; in a cluster only of train,"
        " because the other stages use all GPUs",
    )
    cluster: str | None = Field(
        None,
        description="Ray cluster that runs generate, score, train and evaluate: `local` (this machine), `auto` (the one"
        " that this machine belongs to), `<host>:<port>` or `ray://<host>:<port>`; null uses none",
    )
    cluster_storage: Literal["copy", "shared"] = Field(
        "copy",
        description="`copy` sends inputs to the nodes and results back; `shared` if all nodes have the project's"
        " folder at the same path",
    )
    cluster_score_gpus: Fraction = Field(
        1.0, description="GPUs per process of score in a cluster; 0.25 lets four processes share a GPU"
    )
    batch_size: PositiveInt = Field(16, description="images sampled at once; halved when memory runs out")
    vae_batch_size: PositiveInt = Field(8, description="images that the VAE decodes at once, at most `batch_size`")
    offload: bool = Field(
        False,
        description="keep on the GPU only the model that computes: text encoders, UNet, VAE and rewards take turns,"
        " which takes time",
    )
    train_batch_size: PositiveInt | None = Field(
        None,
        description="samples per forward pass of training, accumulated to train.batch_size; null is all at once",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in training: slower, with less memory"
    )
    checkpoint_every: PositiveInt = Field(
        100, description="training steps between checkpoints, from which an interrupted run resumes"
    )
    compile: bool = Field(False, description="compile the UNet's repeated blocks (CUDA only), which takes minutes")

    @field_validator("cluster", mode="after")
    @classmethod
    def _cluster_is_an_address(cls, value: str | None) -> str | None:
        if value is not None and not CLUSTER.fullmatch(value):
            raise ValueError(f"{value!r:.80} is no cluster; write local, auto, <host>:<port> or ray://<host>:<port>")
        return value


class TrackingParams(Section):
    """MLflow settings."""

    uri: str = Field("sqlite:///mlflow.db", description="MLflow tracking URI")
    experiment: str = Field("srpo", min_length=1, description="MLflow experiment")
    campaign: str = Field("campaign", min_length=1, description="name of the parent run of all rounds")


class RoundParams(Section):
    """A round. Its overrides are per stage, `{}` for none, because DVC tracks them by key."""

    parent: str = Field(min_length=1, description="`base` or the name of another round")
    generate: dict[str, Any] = Field(description="overrides of `generate`")
    select: dict[str, Any] = Field(description="overrides of `select`")
    train: dict[str, Any] = Field(description="overrides of `train`")
