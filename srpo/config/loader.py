"""The typed, validated view of `params.yaml`: what its sections (srpo/config/schema.py) must be together."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError, field_validator, model_validator

from srpo import rounds
from srpo.config.schema import (
    INCEPTION,
    EvaluateParams,
    GateParams,
    GenerateParams,
    ModelParams,
    PromptParams,
    RewardParams,
    RoundParams,
    RuntimeParams,
    Section,
    SelectParams,
    TrackingParams,
    TrainParams,
)
from srpo.errors import UserError
from srpo.rewards.families import FAMILIES, find_family

PARAMS_FILE = "params.yaml"
STAGES_WITH_OVERRIDES = ("generate", "select", "train")


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

    @model_validator(mode="after")
    def _previews_have_a_reward(self) -> Params:
        top = self.generate.early_rejection
        if top and (top.reward not in self.rewards or self.rewards[top.reward].role != "select"):
            raise ValueError(f"generate.early_rejection.reward: {top.reward!r} is not a reward with role select")
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
    "preview_scores", "stopped_at", "would_stop_at", "audited",
    "margin", "weight", "loser_id", "selection_score", "invalid", "file",
    "place", "finished", "winner", "tags", "disagreement",
    "images", "fid", "kid", "cmmd", "diversity", "drift", "drift_kid", "verdict", "finding",
    "saturation", "contrast", "edge_density", "color_entropy", INCEPTION,
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
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    # the last three: a date or number that is none, what can't be a key, brackets without end
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML; {_yaml_problem(error)}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must be a mapping of sections, found {type(raw).__name__}")
    nodes = raw.get("rounds")
    for key in nodes if isinstance(nodes, dict) else ():
        if not isinstance(key, str):
            raise UserError(f'{path}: rounds: the key {key!r} is not text; quote it, as in "{key!s:>03}"')
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_problem(error)}") from None
    except UnicodeEncodeError:
        raise UserError(f"{path}: holds half a character (a lone surrogate); remove it") from None
    for key, node in params.rounds.items():
        if problem := _misfit(params.for_round(key), params, node.parent):
            raise UserError(f"{path}: rounds.{key}.{problem}")
    return params


def _misfit(resolved: Params, whole: Params, parent: str) -> str | None:
    rejection, top = resolved.generate.early_rejection, whole.generate.early_rejection
    if rejection and (top is None or rejection.reward != top.reward):
        return "generate.early_rejection.reward: must be generate.early_rejection's; DVC follows that one's model"
    if parent != rounds.BASE and resolved.train.method != whole.for_round(parent).train.method:
        return f"train.method: differs from that of parent {parent}; keep it"
    return None


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
