"""Lines to type, a few for each command: the end of its help, and of its page in the documents.

None is longer than 78 letters: help of 80 columns would break it, and a part is not to be copied.
"""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "predict": (
        "mhcplan predict mhc-27b",
        "mhcplan predict mhc-27b --n 2 --schedule 1f1b --recompute-block none",
        "mhcplan predict plan.toml --pp 4 --set memory_limit_bytes=141GB",
        "mhcplan predict mhc-9b --json",
        "mhcplan predict mhc-27b --out out",
    ),
    "sweep": (
        "mhcplan sweep mhc-27b --n 1,2,4 --pp 4,8 --global-batch 512",
        "mhcplan sweep plan.toml --microbatches 16..64..16 --set p2p=eager,grouped",
        "mhcplan sweep mhc-27b --recompute-block none,auto,1..8 --fast --csv out.csv",
    ),
    "plan": (
        "mhcplan plan mhc-27b --gpus 64 --memory-gib 80",
        "mhcplan plan mhc-27b --gpus 128 --schedule zbv,dualpipe --global-batch 1024",
        "mhcplan plan plan.toml --gpus 64 --pp 8 --n 2,4",
    ),
    "export": (
        "mhcplan export mhc-27b --to stream-json -o out",
        "mhcplan export plan.toml --schedule dualpipev --to torch-csv -o out",
    ),
    "check": (
        "mhcplan check out/program.json",
        "mhcplan check out/compute_comms.csv",
    ),
    "compare": (
        "mhcplan compare mhc-27b 'mhc-27b --n 2'",
        "mhcplan compare a.toml b.toml --out out",
        "mhcplan compare out/predicted.json measured.json",
        "mhcplan compare before/report.json plan.toml --json",
    ),
    "explain": (
        "mhcplan explain mhc-27b",
        "mhcplan explain plan.toml --priority none",
    ),
    "diagnose": (
        "mhcplan diagnose run.recording",
        "mhcplan diagnose hc.recording mhc.recording --out out",
        "mhcplan diagnose checkpoint.pt --sinkhorn-steps 20",
    ),
    "run": (
        "mhcplan run mhc-3b --pp 2 --ep 1 --microbatches 8 --steps 20",
        "mhcplan run out/program.json --out measured",
    ),
    "web": (
        "mhcplan web",
        "mhcplan web plan.toml --n 2 --profiles mine.json",
    ),
    "init": (
        "mhcplan init mhc-27b -o plan.toml",
        "mhcplan init --from config.json --pp 8 -o plan.toml",
        "mhcplan init plan.toml --n 2 -o narrower.toml",
    ),
    "show": ("mhcplan profile show h100-sxm", "mhcplan profile show h100-sxm --json"),
    "diff": ("mhcplan profile diff h100-sxm mine.json",),
    "validate": (
        "mhcplan profile validate mine.json",
        "mhcplan profile validate h100-sxm --holdout",
    ),
    "overlap": (
        "mhcplan profile overlap mhc-27b:attention.F mhc-27b:dispatch",
        "mhcplan profile overlap mhc-9b:mhc_post.F 'send_recv 64MiB' --priority high",
        "mhcplan profile overlap gemm_persistent 'all_to_all 8MiB' --ctas 8",
    ),
}
