"""The matrix products of an op: which of its kernels does which, in how many tiles.

A matrix library's kernels have the size of their tiles, and that of their clusters, in their names.
Of grids that are no larger than the chip the tiles are the CTAs (tests/profiles/test_products.py
shows it); of a persistent kernel nothing else says how many there are.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from mhcplan.profiles.vocabulary import BF16

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mhcplan.profiles.schema import Segment
    from mhcplan.profiles.vocabulary import OpKey

_LIBRARY = "nvjet"
_SPLIT = "splitK"  # several of its tiles share an output
_TILE = re.compile(r"_(\d+)x(\d+)_")
_CLUSTER = re.compile(r"_\d+x\d+_\d+x\d+_(\d+)x(\d+)_")  # behind a tile and its stages


class Product(NamedTuple):
    """A product: its tiles, 0 where the name does not tell, and the bytes of its operands."""

    tiles: int
    operand_bytes: int


def products_of(key: OpKey, segments: Sequence[Segment]) -> dict[int, Product]:
    """Products of an op by the place of their kernel in ``segments``; none where the order in which
    the op launches them is not known."""
    shape = dict(key.shape)
    features = _features(f"{key.kind}.{key.pass_}", shape)
    at = [i for i, segment in enumerate(segments) if segment.name.startswith(_LIBRARY)]
    if not at or len(features) != len(at):
        return {}
    tokens = shape["tokens"]
    return {
        i: Product(
            _tiles(segments[i].name, made, tokens),
            BF16 * (tokens * made + tokens * read + made * read),
        )
        for i, (made, read) in zip(at, features, strict=True)
    }


def cluster_of(kernel: str) -> int:
    """CTAs that a kernel of the library places together, by its name; 1 for other kernels.

    >>> cluster_of("nvjet_sm90_tst_128x256_64x4_1x4_h_bz_coopA_NNN")
    4
    """
    found = _CLUSTER.search(kernel) if kernel.startswith(_LIBRARY) else None
    return int(found[1]) * int(found[2]) if found else 1


def _tiles(kernel: str, features: int, tokens: int) -> int:
    tile = _TILE.search(kernel)
    if tile is None or _SPLIT in kernel:
        return 0
    wide, high = map(int, tile.groups())
    return -(-features // wide) * -(-tokens // high)


def _features(name: str, s: Mapping[str, int]) -> list[tuple[int, int]]:
    """What each product of an op makes of every token, and out of what, in the order of launch."""
    hidden = s.get("hidden", 0)
    if name in ("shared_experts.F", "dense_ffn.F"):
        return [(2 * s["ffn"], hidden), (hidden, s["ffn"])]
    if name in ("shared_experts.I", "dense_ffn.I"):
        return [(s["ffn"], hidden), (hidden, 2 * s["ffn"])]
    if name in ("attention_gqa.F", "attention_gqa.I"):
        queries = s["heads"] * s["head_dim"]
        all_three = queries + 2 * s["kv_heads"] * s["head_dim"]
        if name == "attention_gqa.F":
            return [(all_three, hidden), (hidden, queries)]
        return [(queries, hidden), (hidden, all_three)]
    if name not in ("attention_mla.F", "attention_mla.I"):
        return []
    queries, keys = s["heads"] * (s["nope"] + s["rope"]), s["heads"] * s["nope"]
    values, latent = s["heads"] * s["v"], s["kv_rank"]
    q_rank = s["q_rank"]
    query = [(q_rank, hidden), (queries, q_rank)] if q_rank else [(queries, hidden)]
    if name == "attention_mla.F":
        return [
            *query, (latent + s["rope"], hidden), (keys, latent), (values, latent),
            (hidden, values),
        ]  # fmt: skip
    return [
        (values, hidden), (latent, values), (latent, keys), (hidden, latent + s["rope"]),
        *((read, made) for made, read in reversed(query)),
    ]  # fmt: skip
