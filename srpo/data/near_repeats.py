"""Near repeats among many short texts: MinHash signatures and buckets, then the exact similarity.

Broder, On the resemblance and containment of documents (1997); Leskovec, Rajaraman and Ullman, Mining of Massive
Datasets, chapter 3. Time grows linearly with the number of texts.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

SHINGLE = 5  # characters
THRESHOLD = 0.8
# two texts share a bucket when all hashes of one band agree: with probability 0.99 at a similarity of 0.8 and 1 at 0.9
BANDS = 25
ROWS = 8
# texts made from one template fill a few buckets, and comparing all of those would take quadratic time
COMPARED = 32
MARGIN = 0.15  # five standard deviations of the similarity that two signatures estimate
ASCII_WORD = re.compile(r"[^\s!-/:-@\[-`{-~\0-\x1f]+")


def fold(text: str) -> str:
    """Return the text without case, punctuation, and differences in spacing and in the encoding of letters."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    if folded.isascii():
        return " ".join(ASCII_WORD.findall(folded))
    # \w would also drop the vowel signs of Indic scripts
    return " ".join("".join(" " if unicodedata.category(c)[0] in "PZC" else c for c in folded).split())


def similarity(one: str, other: str) -> float:
    """Return the Jaccard similarity (0 to 1) of the sets of 5-character pieces of two folded texts."""
    first, second = _pieces(one), _pieces(other)
    return len(first & second) / len(first | second)


def find_near_repeats(texts: Sequence[str], seed: int = 0) -> list[int | None]:
    """Return for every text the place of an earlier text that it nearly repeats, or None.

    A near repeat has a `similarity` of 0.8 or more, after `fold`, to a text that is not a near repeat itself.
    The search misses about 1 in 100 pairs at 0.8, and none in practice at 0.9 and above.
    """
    generator = np.random.default_rng(seed)
    factors, offsets = generator.integers(0, 1 << 64, (2, BANDS * ROWS, 1), dtype=np.uint64)
    factors |= np.uint64(1)
    signatures = np.empty((len(texts), BANDS * ROWS), np.uint32)
    buckets: list[dict[bytes, list[int]]] = [defaultdict(list) for _ in range(BANDS)]
    kept: dict[int, str] = {}
    found: list[int | None] = []
    for place, text in enumerate(texts):
        folded = fold(text)
        signature = signatures[place] = _signature(folded, factors, offsets)
        homes = [buckets[band][part.tobytes()] for band, part in enumerate(signature.reshape(BANDS, ROWS))]
        rivals = np.array(list(dict.fromkeys(rival for home in homes for rival in home[:COMPARED])), int)
        estimates = (signatures[rivals] == signature).mean(axis=1)
        likely = rivals[estimates > THRESHOLD - MARGIN]
        original = next((int(rival) for rival in likely if similarity(kept[rival], folded) >= THRESHOLD), None)
        found.append(original)
        if original is None:
            kept[place] = folded
            for home in homes:
                home.append(place)
    return found


def _padded(text: str) -> str:
    return f" {text} ".ljust(SHINGLE)


def _pieces(text: str) -> set[str]:
    padded = _padded(text)
    return {padded[start : start + SHINGLE] for start in range(len(padded) - SHINGLE + 1)}


def _signature(text: str, factors: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return uint32 [hashes]: the least value of every hash function over the text's pieces."""
    letters = np.frombuffer(_padded(text).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    codes = np.zeros(len(letters) - SHINGLE + 1, np.uint64)
    for column in np.lib.stride_tricks.sliding_window_view(letters, SHINGLE).T:
        codes = codes * np.uint64(0x9E3779B97F4A7C15) + column  # modulo 2^64
    return ((codes * factors + offsets) >> np.uint64(32)).min(axis=1).astype(np.uint32)
