"""All that the stages import, for the server that commands are forked from. It computes nothing: no thread survives."""

# ruff: noqa: F401
import diffusers
import mlflow
import peft
import transformers

import srpo.base
import srpo.cli
import srpo.evaluate
import srpo.generate
import srpo.report
import srpo.rewards.clip
import srpo.rewards.templates
import srpo.score
import srpo.select
import srpo.tracking
import srpo.train
import tests.world
