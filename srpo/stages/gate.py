"""Stage `gate`: decide whether a round passes, from its evaluation and those of base and its parent."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from srpo.data.eval_scores import at_guidance, read_eval_scores
from srpo.data.records import headline, read_drift, read_sweep
from srpo.evaluation.bootstrap import Estimate, win_rate
from srpo.evaluation.gate import HACKING, best_guidance, best_of_sweep, image_stat_shifts, judge_round
from srpo.review.votes import frozen_votes, human_record, reward_differences
from srpo.rounds import BASE, Round
from srpo.storage.json_files import write_json

log = logging.getLogger(__name__)
Sweep = Mapping[str, Mapping[str, float]]


def gate(round: Round) -> None:
    """Write `gate.json` and `metrics.json` in `rounds/<key>/evaluation/`.

    gate.json: the rules, win rates over base and parent, shifts of image statistics, and what people voted.
    metrics.json: flat headline numbers at the reported guidance; `<reward>_best` and `fid_best`, at the round's best
    guidance; win rates over base (with the interval's lower end) and parent, each model at its own best guidance; the
    win rate and agreement of people if there are votes; the verdict and the finding.

    Raises:
        UserError: an evaluation is missing or damaged, or the votes are of other images.
    """
    files = round.files
    sweep = read_sweep(files)
    record = _judge(round, sweep)
    metrics = headline(sweep, round.params.evaluate.guidance_scale, round.params.rewards) | read_drift(files)
    metrics |= best_of_sweep(sweep, round.params.rewards)
    for judge in round.params.reward_names("judge"):
        rates = record["win_rate"][judge]
        metrics |= {f"{judge}_win_rate": rates["best"]["value"], f"{judge}_win_rate_low": rates["best"]["low"]}
        metrics[f"{judge}_win_rate_parent"] = rates["parent_best"]["value"]
    metrics |= _human_metrics(record["human"])
    metrics |= {"verdict": record["verdict"], "finding": record["finding"] or "-"}
    write_json(files.evaluation / "gate.json", record)
    write_json(files.evaluation / "metrics.json", metrics)
    failed = [name for name, rule in record["rules"].items() if not rule["passed"]]
    log.info("gate %s: %s%s", round.key, record["verdict"], f" ({', '.join(failed)})" if failed else "")
    if record["finding"] == HACKING:
        log.warning("gate %s: %s: the selecting reward rose, no judge did", round.key, HACKING)
    elif record["finding"]:
        log.warning("gate %s: %s by any judge", round.key, record["finding"])


def _judge(round: Round, sweep: Sweep) -> dict[str, Any]:
    """Return gate.json. Win rates `best`, `parent_best`: at each best guidance; `base`, `parent`: at the reported."""
    params = round.params
    reported = params.evaluate.guidance_scale
    base_sweep = read_sweep(round.base_files)
    parent_sweep = read_sweep(round.parent_files)
    scores, base, parent = (
        read_eval_scores(files, params.rewards) for files in (round.files, round.base_files, round.parent_files)
    )
    best: dict[str, Estimate] = {}
    over_parent: dict[str, Estimate] = {}
    rates: dict[str, Any] = {}
    missing: dict[str, float] = {}
    for name in params.rewards:
        guidance = float(best_guidance(sweep, name))
        base_guidance = float(best_guidance(base_sweep, name))
        parent_guidance = float(best_guidance(parent_sweep, name))
        best[name] = _win_rate(scores, base, name, guidance, base_guidance)
        over_parent[name] = _win_rate(scores, parent, name, guidance, parent_guidance)
        rates[name] = {
            "best": best[name]._asdict() | {"guidance": guidance, "base_guidance": base_guidance},
            "base": _win_rate(scores, base, name, reported, reported)._asdict(),
            "parent": _win_rate(scores, parent, name, reported, reported)._asdict(),
            "parent_best": over_parent[name]._asdict() | {"guidance": guidance, "parent_guidance": parent_guidance},
        }
        share = max(_missing(scores, name, guidance), _missing(base, name, base_guidance))
        if share and params.rewards[name].role == "judge":
            missing[name] = share
    judges, selects = ({name: best[name] for name in params.reward_names(role)} for role in ("judge", "select"))
    parents = {name: over_parent[name] for name in judges}
    votes = frozen_votes(round)
    human = human_record(votes, reward_differences(round, BASE) if votes else {})
    return judge_round(params.gate, sweep, base_sweep, judges, selects, missing, parents, human) | {
        "best_fid": {
            "guidance": float(best_guidance(sweep, "fid")),
            "base_guidance": float(best_guidance(base_sweep, "fid")),
        },
        "win_rate": rates,
        "image_stats": image_stat_shifts(sweep, base_sweep),
        "human": human,
    }


def _human_metrics(human: Mapping[str, Any] | None) -> dict[str, float | int | None]:
    """Return what metrics.json holds about people, with the whole interval of the win rate; nothing without votes."""
    if human is None:
        return {}
    rate = human["win_rate"]
    metrics = {"human_win_rate": rate["value"], "human_win_rate_low": rate["low"], "human_win_rate_high": rate["high"]}
    metrics |= {"human_votes": human["votes"], "human_alpha": human["alpha"]}
    agreement = {f"{name}_human_agreement": found["value"] for name, found in human["agreement"].items() if found}
    return metrics | agreement


def _win_rate(scores: pl.DataFrame, other: pl.DataFrame, name: str, guidance: float, other_guidance: float) -> Estimate:
    one = at_guidance(scores, guidance)
    two = at_guidance(other, other_guidance)
    return win_rate(one[name].to_numpy(), two[name].to_numpy(), one["prompt_id"].to_list())


def _missing(scores: pl.DataFrame, name: str, guidance: float) -> float:
    """Return the share of scores that are NaN or infinite."""
    return float(np.mean(~np.isfinite(at_guidance(scores, guidance)[name].to_numpy())))
