"""Which op keys a capture measures."""
TINY: dict[str, dict[str, int]] = {
    "mhc_pre": {"n": 2, "hidden": 64, "tokens": 5, "steps": 3},
    "mhc_post": {"n": 4, "hidden": 64, "tokens": 5},
    "mhc_recompute": {"n": 2, "hidden": 64, "tokens": 5, "sites": 3},
    "hc_pre": {"n": 2, "hidden": 64, "tokens": 5},
    "hc_post": {"n": 2, "hidden": 64, "tokens": 5},
    "mhc_expand": {"n": 2, "hidden": 64, "tokens": 5},
    "mhc_collapse": {"n": 2, "hidden": 64, "tokens": 5},
    "residual": {"tokens": 5, "hidden": 48},
    "norm": {"tokens": 5, "hidden": 48},
    "attention_mla": {
        "tokens": 14, "seq": 7, "hidden": 32, "heads": 3, "nope": 8, "rope": 4, "v": 6,
        "kv_rank": 16, "q_rank": 0,
    },
    "attention_gqa": {
        "tokens": 14, "seq": 7, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8,
    },
    "dense_ffn": {"tokens": 5, "hidden": 32, "ffn": 24},
    "shared_experts": {"tokens": 5, "hidden": 32, "ffn": 16},
    "router": {"tokens": 37, "hidden": 32, "experts": 6, "top_k": 2},
    "regroup": {"rows": 64, "hidden": 48},
    "experts": {"rows": 21, "hidden": 32, "ffn": 16, "experts": 3},
    "unpermute": {"tokens": 9, "hidden": 48, "top_k": 3},
    "embedding": {"tokens": 9, "hidden": 32, "vocab": 11},
    "head": {"tokens": 9, "hidden": 32, "vocab": 50},
    "adamw": {"parameters": 1500},
    "zero_gradients": {"parameters": 1500},
}  # fmt: skip
