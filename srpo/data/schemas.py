"""Column schemas of all datasets.

A column `latents` or `loser_latents` holds the bytes of a little-endian float16 array of the shape in `latents_shape`:
`np.frombuffer(row["latents"], "<f2").reshape(row["latents_shape"])`. A parquet list would be decoded number by number.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

Fields = dict[str, pa.DataType]

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
LATENTS = pa.binary()

IDENTITY_FIELDS: Fields = {"candidate_id": pa.string(), "prompt_id": pa.string(), "index": pa.int32()}

CANDIDATE_FIELDS: Fields = {
    "candidate_id": pa.string(),
    "prompt_id": pa.string(),
    "prompt": pa.string(),
    "index": pa.int32(),
    "seed": pa.int64(),
    "image": IMAGE,
    "latents": LATENTS,
    "latents_shape": pa.list_(pa.int32()),
    "steps": pa.int32(),
    "guidance": pa.float32(),
    # early rejection: one score per checkpoint reached; the number of steps done; the number of steps that it asks
    # for, lower than those done only in audited prompts. Candidates that were stopped early have no image or latents.
    "preview_scores": pa.list_(pa.float32()),
    "stopped_at": pa.int32(),
    "would_stop_at": pa.int32(),
    "audited": pa.bool_(),
}
SCORE_FIELDS: Fields = IDENTITY_FIELDS | {"invalid": pa.bool_()}
"""Of scores, besides one float32 column per reward."""

WINNER_FIELDS: Fields = {
    "selection_score": pa.float32(),
    "margin": pa.float32(),
    "weight": pa.float32(),
    "loser_id": pa.string(),
    "loser_latents": LATENTS,
}
"""Of winners, besides the candidates' columns and one float32 column per reward."""

PER_PROMPT_FIELDS: Fields = {
    "prompt_id": pa.string(),
    "prompt": pa.string(),
    "index": pa.int32(),
    "guidance": pa.float32(),
}
"""Of per_prompt.parquet, besides one float32 column per reward."""

SAMPLE_FIELDS: Fields = {"prompt_id": pa.string(), "prompt": pa.string(), "index": pa.int32(), "image": IMAGE}
REFERENCE_FIELDS: Fields = {"image": IMAGE}

TYPES: Fields = CANDIDATE_FIELDS | SCORE_FIELDS | WINNER_FIELDS | PER_PROMPT_FIELDS | SAMPLE_FIELDS | REFERENCE_FIELDS
"""The type of every column that is not a reward's: a name has the same type in all datasets."""

RESERVED = frozenset(TYPES)
"""Column names that a reward can't have."""

_DTYPES = {
    pa.string(): "string", pa.int32(): "int32", pa.int64(): "int64", pa.float32(): "float32", pa.bool_(): "bool",
    pa.binary(): "binary",
}  # fmt: skip


def with_rewards(fields: Mapping[str, pa.DataType], rewards: Iterable[str]) -> Fields:
    """Return these fields and one float32 column per reward, before the column `invalid` if there is one."""
    added = {name: kind for name, kind in fields.items() if name != "invalid"} | dict.fromkeys(rewards, pa.float32())
    return added | {name: kind for name, kind in fields.items() if name == "invalid"}


def arrow_schema(fields: Mapping[str, pa.DataType]) -> pa.Schema:
    """Return an Arrow schema with the metadata by which Hugging Face `datasets` decodes the image column."""
    features: dict[str, Any] = {}
    for name, kind in fields.items():
        if kind == IMAGE:
            features[name] = {"_type": "Image"}
        elif pa.types.is_list(kind):
            features[name] = {"feature": {"dtype": _DTYPES[kind.value_type], "_type": "Value"}, "_type": "List"}
        else:
            features[name] = {"dtype": _DTYPES[kind], "_type": "Value"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema(list(fields.items()), metadata=metadata)
