"""Column schemas of all datasets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

LATENTS = pa.list_(pa.float16())

IDENTITY_FIELDS = {"candidate_id": pa.string(), "prompt_id": pa.string(), "index": pa.int32()}

CANDIDATE_FIELDS = {
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
    # early rejection: one score per checkpoint reached; the steps done; the steps that it asks for, which are
    # fewer than those done only where a prompt is audited. What was given up has neither image nor latents.
    "preview_scores": pa.list_(pa.float32()),
    "stopped_at": pa.int32(),
    "would_stop_at": pa.int32(),
    "audited": pa.bool_(),
}

_DTYPES = {
    pa.string(): "string", pa.int32(): "int32", pa.int64(): "int64", pa.float16(): "float16", pa.float32(): "float32",
    pa.bool_(): "bool",
}  # fmt: skip


def arrow_schema(fields: Mapping[str, pa.DataType]) -> pa.Schema:
    """An Arrow schema carrying the metadata by which HF `datasets` knows the image column."""
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
