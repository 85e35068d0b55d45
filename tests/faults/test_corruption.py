"""A flipped bit or a cut file is found before it is used and named in one line; the right bytes back, all is well."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from srpo.data import parquet
from srpo.data.images import encode_image
from srpo.data.schemas import IMAGE, LATENTS
from srpo.errors import UserError
from tests.faults.helpers import command_of, contents, run, take_away


@dataclass(frozen=True)
class Case:
    """A file (its only match under the project), the command that reads it, and the stage whose outputs it makes."""

    pattern: str
    command: tuple[str, ...]
    named: str = ""
    column: str = "latents"

    def file(self, root: Path) -> Path:
        return sorted(root.glob(self.pattern))[0]


REPORTED = [
    Case("rounds/001/candidates/shard-00000*", ("score", "001"), column="image"),
    Case("rounds/001/candidates/shard-00000*", ("select", "001")),
    Case("rounds/001/scores/select/reward.parquet", ("select", "001"), column="reward"),
    Case("rounds/001/scores/judge/judge.parquet", ("report", "001"), column="judge"),
    Case("rounds/001/winners/shard-00000*", ("train", "001")),
    Case("rounds/001/winners/shard-00000*", ("report", "001"), column="candidate_id"),
    Case("rounds/001/adapter/*.safetensors", ("evaluate", "001")),
    Case("rounds/001/adapter/*.safetensors", ("generate", "002")),
    Case("rounds/base/evaluation/features.safetensors", ("evaluate", "001")),
    Case("rounds/base/evaluation/per_prompt.parquet", ("gate", "001"), column="judge"),
    Case("rounds/base/evaluation/samples.parquet", ("report", "001"), column="image"),
    Case("data/base/unet/*.safetensors", ("generate", "002"), "data/base"),
    Case("data/base/unet/*.safetensors", ("train", "001"), "data/base"),
    Case("data/reward/*.safetensors", ("score", "001"), "data/reward"),
    Case("data/judge/*.safetensors", ("evaluate", "001"), "data/judge"),
    Case("data/reference/*.parquet", ("evaluate", "001"), column="image"),
]
REBUILT = [
    Case(".srpo/cache/reference-*", ("evaluate", "001"), "computing it again"),
    Case(".srpo/cache/embeds/*/*.safetensors", ("generate", "001"), "encoding its prompts anew"),
]
CUT_ONLY = [
    Case("rounds/001/adapter/lineage.json", ("evaluate", "001")),
    Case("rounds/base/adapter/lineage.json", ("generate", "001")),
    Case("rounds/base/evaluation/guidance.csv", ("gate", "001")),
    Case("rounds/001/evaluation/metrics.json", ("report", "001")),
    Case("rounds/001/evaluation/gate.json", ("report", "001")),
    Case("data/prompts/train.jsonl", ("generate", "001")),
]


def flip(file: Path, column: str) -> None:
    """One bit of the content: in a parquet file the last one of one column chunk, elsewhere two thirds in."""
    data = bytearray(file.read_bytes())
    at = len(data) * 2 // 3
    if file.suffix == ".parquet":
        group = pq.read_metadata(file).row_group(0)
        chunks = {group.column(i).path_in_schema.split(".")[0]: group.column(i) for i in range(group.num_columns)}
        chunk = chunks[column]
        at = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 1
    data[at] ^= 4
    file.write_bytes(data)


def cut(file: Path, column: str) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) * 2 // 3])


DAMAGES = {"flipped": flip, "cut": cut}


def name_of(case: Case) -> str:
    return f"{case.pattern.split('/', 1)[1]}-{case.command[0]}"


def spoil(case: Case, root: Path, damage: str) -> tuple[Path, bytes]:
    file = case.file(root)
    sound = file.read_bytes()
    DAMAGES[damage](file, case.column)
    return file, sound


def check_reported(case: Case, root: Path, damage: str) -> None:
    if case.command[0] == "score":  # scores that are there are not computed again
        take_away(root, "score")
    undisturbed = contents(root, case.command[0])
    file, sound = spoil(case, root, damage)
    code, told = run(root, *case.command)
    file.write_bytes(sound)
    assert code == 2, told
    assert "Traceback" not in told
    (line,) = [line for line in told.splitlines() if line.startswith("srpo: error: ")]
    assert (case.named or str(file.relative_to(root))) in line, line
    assert contents(root, case.command[0]) == undisturbed, "damage spread to what was published"
    assert not (root / "rounds" / "002" / "candidates").exists()


@pytest.mark.parametrize("case", [case for case in REPORTED if case.command[0] in ("select", "score")], ids=name_of)
def test_a_flipped_bit_is_reported(project: Path, case: Case) -> None:
    check_reported(case, project, "flipped")


@pytest.mark.slow  # a second a case, and more where imports are slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("case", REPORTED, ids=name_of)
def test_damage_is_reported(project: Path, case: Case, damage: str) -> None:
    check_reported(case, project, damage)


@pytest.mark.slow
@pytest.mark.parametrize("case", CUT_ONLY, ids=name_of)
def test_truncated_text_files_are_reported(project: Path, case: Case) -> None:
    check_reported(case, project, "cut")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("case", REBUILT, ids=name_of)
def test_damaged_caches_are_rebuilt(project: Path, case: Case, damage: str) -> None:
    undisturbed = contents(project, case.command[0])
    file, sound = spoil(case, project, damage)
    code, told = run(project, *command_of(case.command[0]))
    assert code == 0, told
    assert case.named in told
    assert contents(project, case.command[0]) == undisturbed
    assert file.read_bytes() == sound


def test_flipped_bits_change_no_value(tmp_path: Path) -> None:
    """One bit of every third byte: pages have checksums; damage to the footer is reported or affects no value."""
    path = tmp_path / "table.parquet"
    fields = {"candidate_id": pa.string(), "image": IMAGE, "latents": LATENTS, "reward": pa.float32()}
    rng = np.random.default_rng(0)
    rows = [
        {
            "candidate_id": f"001-{number}",
            "image": encode_image(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)),
            "latents": parquet.latents_bytes(rng.normal(size=4)),
            "reward": float(number),
        }
        for number in range(8)
    ]
    parquet.write_table(path, rows, fields)
    sound = list(parquet.read_rows(path, list(fields)))
    data = path.read_bytes()
    reported = 0
    for at in range(0, len(data), 3):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        try:
            assert list(parquet.read_rows(path, list(fields))) == sound, f"byte {at} of {len(data)}"
        except UserError:
            reported += 1
    assert reported > len(data) / 3 / 2
