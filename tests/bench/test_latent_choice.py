"""The choice over a shared-out dictionary: what DTensor and what our ranks send, as the report has it."""

from __future__ import annotations

import json
import subprocess
import sys

ROWS, LATENTS, K, RANKS = 64, 512, 4, 2


def test_dtensor_gathers_all_pre_activations_and_our_ranks_their_k_largest():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    sizes = ["--rows", str(ROWS), "--latents", str(LATENTS), "--k", str(K), "--rounds", "1"]
    command = [*torchrun, "-m", "bench.latent_choice", *sizes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr  # both sides' values are torch.topk's, or it ends here
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(found["ours"]["bytes"].values()) == 4 * RANKS * ROWS * K
    assert sum(found["dtensor"]["bytes"].values()) == 4 * ROWS * LATENTS + 4 * ROWS * K
    assert (found["ours"]["collectives"], found["dtensor"]["collectives"]) == (1, 2)
