"""A round with its resolved params, and the paths of its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from srpo.config.loader import Params
from srpo.config.schema import GenerateParams
from srpo.config.tree import BASE, ancestors


@dataclass(frozen=True)
class RoundFiles:
    """The paths of one round's files under `<root>/rounds/<key>/`."""

    root: Path
    key: str

    @property
    def folder(self) -> Path:
        """The round's folder."""
        return self.root / "rounds" / self.key

    @property
    def candidates(self) -> Path:
        """Folder of parquet shards, one row per candidate."""
        return self.folder / "candidates"

    @property
    def scores(self) -> Path:
        """Folder of the scores, one parquet file per reward (`srpo.data.scores`)."""
        return self.folder / "scores"

    @property
    def winners(self) -> Path:
        """Folder of parquet shards, one row per winner."""
        return self.folder / "winners"

    @property
    def adapter(self) -> Path:
        """Folder of the trained weights and lineage.json."""
        return self.folder / "adapter"

    @property
    def training(self) -> Path:
        """CSV file, one row per logged training step."""
        return self.folder / "training.csv"

    @property
    def rewards(self) -> Path:
        """Base only: the identities of all rewards."""
        return self.folder / "rewards.json"

    @property
    def selecting(self) -> Path:
        """Of base only: the identities and weights of the rewards that choose winners."""
        return self.folder / "selecting.json"

    @property
    def preview(self) -> Path:
        """Base only: the identity of the reward that scores previews."""
        return self.folder / "preview.json"

    @property
    def evaluation(self) -> Path:
        """Folder of metrics, per-prompt scores, samples and the gate's decision."""
        return self.folder / "evaluation"

    @property
    def review(self) -> Path:
        """Folder of what people decided about the round, beside `rounds/`."""
        return self.root / "review" / self.key

    @property
    def report(self) -> Path:
        """Folder of the report page."""
        return self.folder / "report"


@dataclass(frozen=True)
class Round:
    """A round or base, with its overrides applied. Each command creates one and passes it on.

    Attributes:
        key: a key of `rounds` in params.yaml, or `base`.
        params: with this round's overrides applied; base has none.
        root: the project's folder, which contains params.yaml.
        generate_of_path: `generate` of the rounds from base to this one with their overrides, the oldest first.
    """

    key: str
    params: Params
    root: Path
    generate_of_path: tuple[GenerateParams, ...] = ()

    @classmethod
    def of(cls, params: Params, root: Path, key: str) -> Round:
        """Return the round `key` of these params.

        Raises:
            UserError: no such round.
        """
        if key == BASE:
            return cls(key, params, root)
        resolved = params.for_round(key)
        before = tuple(params.for_round(name).generate for name in ancestors(params.rounds, key))
        return cls(key, resolved, root, (*before, resolved.generate))

    @property
    def parent(self) -> str:
        """The key of the parent; that of base is base."""
        return BASE if self.key == BASE else self.params.rounds[self.key].parent

    @property
    def ancestors(self) -> list[str]:
        """The rounds between base and this one, the oldest first."""
        return [] if self.key == BASE else ancestors(self.params.rounds, self.key)

    @property
    def files(self) -> RoundFiles:
        """The paths of this round."""
        return RoundFiles(self.root, self.key)

    @property
    def parent_files(self) -> RoundFiles:
        """The paths of the parent."""
        return RoundFiles(self.root, self.parent)

    @property
    def base_files(self) -> RoundFiles:
        """The paths of base."""
        return RoundFiles(self.root, BASE)
