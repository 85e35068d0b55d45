"""Loading and validation of params.yaml. The sections are in srpo/config/schema.py."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError, field_validator, model_validator

from srpo.config import tree
from srpo.config.reward_families import FAMILIES, find_family
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
from srpo.data.metric_keys import name_conflict
from srpo.errors import UserError, one_line
from srpo.storage.conflicts import check_no_conflict

PARAMS_FILE = "params.yaml"
STAGES_WITH_OVERRIDES = ("generate", "select", "train")


class Params(Section):
    """All of params.yaml."""

    seed: int = Field(ge=0, lt=2**31, description="seed of all random numbers")
    rounds: dict[str, RoundParams] = Field(min_length=1, description="the tree of rounds")
    model: ModelParams
    prompts: PromptParams
    generate: GenerateParams
    rewards: dict[str, RewardParams] = Field(
        min_length=1, description="by name; the names become columns of the scores"
    )
    select: SelectParams
    train: TrainParams
    evaluate: EvaluateParams
    gate: GateParams = GateParams()
    runtime: RuntimeParams = RuntimeParams()
    tracking: TrackingParams = TrackingParams()

    @field_validator("rounds", mode="after")
    @classmethod
    def _rounds_are_a_tree(cls, value: dict[str, RoundParams]) -> dict[str, RoundParams]:
        tree.check_tree({key: node.parent for key, node in value.items()})
        return value

    @model_validator(mode="after")
    def _rewards_fit(self) -> Params:
        for name, spec in self.rewards.items():
            try:
                find_family(spec.kind)
            except UserError as error:
                raise ValueError(f"rewards.{name}.kind: {error}") from None
            if spec.kind in FAMILIES and spec.model is None:
                raise ValueError(f"rewards.{name}.model: missing; {spec.kind} has no default model, so name one")
            if not name.isidentifier():
                raise ValueError(f"rewards.{name}: not usable as a column name; rename the reward")
            if conflict := name_conflict(name, self.rewards):
                raise ValueError(f"rewards.{name}: {conflict} has this name; rename the reward")
        roles = {spec.role for spec in self.rewards.values()}
        if roles != {"select", "judge"}:
            raise ValueError("rewards: needs at least one with role select and one with role judge")
        if self.evaluate.features != INCEPTION:
            self._check_is_judge("features", self.evaluate.features)
        elif self.evaluate.clip_features is None:
            raise ValueError("evaluate.clip_features: missing; name a judge, since evaluate.features is inception")
        self._check_is_judge("clip_features", self.evaluate.clip_name)
        if self.evaluate.diversity_judge is not None:
            self._check_is_judge("diversity_judge", self.evaluate.diversity_judge)
        return self

    @model_validator(mode="after")
    def _previews_have_a_reward(self) -> Params:
        early = self.generate.early_rejection
        if early and (early.reward not in self.rewards or self.rewards[early.reward].role != "select"):
            raise ValueError(f"generate.early_rejection.reward: {early.reward!r} is not a reward with role select")
        return self

    @model_validator(mode="after")
    def _votes_are_of_rounds(self) -> Params:
        for key in self.gate.votes:
            if key not in self.rounds:
                raise ValueError(f"gate.votes.{key}: no such round; rounds has {', '.join(self.rounds)}")
        return self

    def _check_is_judge(self, key: str, name: str) -> None:
        if name not in self.rewards or self.rewards[name].role != "judge":
            raise ValueError(f"evaluate.{key}: {name!r} is not a reward with role judge")

    def for_round(self, key: str) -> Params:
        """Return these params with the round's overrides applied.

        Raises:
            UserError: the round is not in params.yaml, or an override does not fit its section.
        """
        if key not in self.rounds:
            raise UserError(f"rounds.{key}: no such round in {PARAMS_FILE}; it has {', '.join(self.rounds)}")
        sections = {}
        for stage in STAGES_WITH_OVERRIDES:
            section = getattr(self, stage)
            values = section.model_dump() | getattr(self.rounds[key], stage)
            try:
                sections[stage] = type(section).model_validate(values)
            except ValidationError as error:
                raise UserError(f"{PARAMS_FILE}: {_first_problem(error, ('rounds', key, stage))}") from None
        return self.model_copy(update=sections)

    def reward_names(self, role: str) -> list[str]:
        """Return the names of the rewards with this role (`select` or `judge`), in file order."""
        return [name for name, spec in self.rewards.items() if spec.role == role]


def load_params(path: Path | str = PARAMS_FILE) -> Params:
    """Read and validate a params file, including each round's overrides.

    Raises:
        UserError: one line with the first wrong key, the problem and the remedy.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        check_no_conflict(str(path), text, "keep the lines you want, remove the markers and `git add` the file")
        raw = YAML(typ="safe", pure=True).load(text)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run srpo in the folder that contains params.yaml") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror})") from None
    # the last three: an impossible date or number, an unhashable key, endless brackets
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML; {_yaml_problem(error)}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must be a mapping of sections, not {type(raw).__name__}")
    nodes = raw.get("rounds")
    for key in nodes if isinstance(nodes, dict) else ():
        if not isinstance(key, str):
            raise UserError(f'{path}: rounds: the key {key!r} is not text; quote it, as in "{key!s:>03}"')
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_problem(error)}") from None
    except UnicodeEncodeError:
        raise UserError(f"{path}: contains a lone surrogate, half a character; remove it") from None
    resolved = {key: params.for_round(key) for key in params.rounds}
    for key, node in params.rounds.items():
        early = resolved[key].generate.early_rejection
        if early and (
            params.generate.early_rejection is None or early.reward != params.generate.early_rejection.reward
        ):
            raise UserError(
                f"{path}: rounds.{key}.generate.early_rejection.reward: must be that of generate.early_rejection,"
                " because DVC tracks its model"
            )
        if params.model.fp8 and (resolved[key].train.method == "full" or resolved[key].train.use_dora):
            raise UserError(f"{path}: model.fp8: not possible with train.method full or use_dora; train a plain LoRA")
        if node.parent != tree.BASE and resolved[key].train.method != resolved[node.parent].train.method:
            raise UserError(f"{path}: rounds.{key}.train.method: differs from parent {node.parent}; use the same")
    return params


def _first_problem(error: ValidationError, prefix: tuple[str, ...] = ()) -> str:
    problem = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in (*prefix, *problem["loc"]))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] == "missing":
        hint = "; write {} to override nothing" if key.startswith("rounds.") else "; add it"
        return f"{key}: missing{hint}{more}"
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; remove it or correct its spelling{more}"
    message = problem["msg"].removeprefix("Value error, ")
    value = "" if problem["type"] == "value_error" else f", not {problem['input']!r:.80}"
    return f"{key}: {message}{value}{more}" if key else f"{message}{more}"


def _yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}: " if mark else ""
    return place + (getattr(error, "problem", None) or one_line(error))
