"""All that the stages import, for the server that commands are forked from. It computes nothing: no thread survives."""

# ruff: noqa: F401
import diffusers
import mlflow
import peft
import transformers

import srpo.cli
import srpo.rewards.clip
import srpo.rewards.templates
import srpo.stages.base
import srpo.stages.evaluate
import srpo.stages.generate
import srpo.stages.report
import srpo.stages.score
import srpo.stages.select
import srpo.stages.train
import srpo.tracking.live
import tests.support.world
