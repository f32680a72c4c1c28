"""The other side of `bench.train`, in an environment of its own: sparsify, SAELens, dictionary_learning. No ggscope.

Each step is the library's own code: SAELens' `SAETrainer.step`, dictionary_learning's `update`; sparsify's trainer has
its step inside a hook on a language model, so its body stands here around the library's coder and optimizers.
All start with b_dec at the rows' mean, as sparsify does.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench.common import BenchError
from bench.train_worker import Problem, Served, TrainSide, serve_sides


class Sparsify(TrainSide):
    """EleutherAI's SparseCoder with Adam or schedule-free signum (its default), AuxK and Multi-TopK off (its defaults).

    With warm-up Adam follows its trainer's schedule: up, then down to zero in a line, whatever `decay_steps` says.
    """

    def __init__(self, problem: Problem, optimizer: str = "adam", auxk_alpha: float = 0.0) -> None:
        self.auxk_alpha, self.dead_after_tokens = auxk_alpha, problem.dead_after_tokens
        config = importlib.import_module("sparsify").SparseCoderConfig(num_latents=problem.num_latents, k=problem.k)
        coder = importlib.import_module("sparsify.sparse_coder").SparseCoder
        self.coder = coder(problem.d_in, config, problem.device, dtype=torch.float32)
        self.coder.b_dec.data = problem.mean_D.to(problem.device, copy=True)
        relative = (problem.num_latents / 2**14) ** 0.5
        self.signum = optimizer == "signum"
        if self.signum:
            sign = importlib.import_module("sparsify.sign_sgd").SignSGD
            base = sign(self.coder.parameters(), lr=problem.lr or 5e-3 / relative)
            self.optimizer: Any = importlib.import_module("schedulefree").ScheduleFreeWrapper(base, momentum=0.95)
            self.optimizer.train()
        else:
            self.optimizer = torch.optim.Adam(self.coder.parameters(), lr=problem.lr or 2e-4 / relative)
        self.schedule: Any = None
        if problem.warmup_steps and not self.signum:
            linear = importlib.import_module("transformers").get_linear_schedule_with_warmup
            self.schedule = linear(self.optimizer, problem.warmup_steps, problem.steps)
        self.idle_F = torch.zeros(problem.num_latents, dtype=torch.long, device=problem.device)
        self.fired_F = torch.zeros(problem.num_latents, dtype=torch.bool, device=problem.device)

    def step(self, x_ND: torch.Tensor) -> None:
        coder = self.coder
        coder.set_decoder_norm_to_unit_norm()
        total_variance = (x_ND - x_ND.mean(0)).pow(2).sum()
        dead_F = self.idle_F > self.dead_after_tokens if self.auxk_alpha else None
        out = coder(x=x_ND, y=x_ND, dead_mask=dead_F, total_variance=total_variance)
        self.fired_F[out.latent_indices.flatten()] = True
        (out.fvu + self.auxk_alpha * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        self.optimizer.zero_grad()
        self.idle_F += len(x_ND)
        self.idle_F[self.fired_F] = 0
        self.fired_F.zero_()

    def reconstruct(self, x_ND: torch.Tensor) -> torch.Tensor:
        if not self.signum:
            return self.coder(x_ND).sae_out
        self.optimizer.eval()
        x_hat_ND = self.coder(x_ND).sae_out
        self.optimizer.train()
        return x_hat_ND

    def save(self, folder: Path, scale: float) -> None:
        """As the library saves it. `scale`: the rows were the raw ones times it, which must be 1: nothing folds it."""
        if scale != 1 or self.signum:
            raise BenchError("sparsify is saved from raw rows and Adam")
        self.coder.set_decoder_norm_to_unit_norm()  # its trainer does so before it saves
        self.coder.save_to_disk(folder)


class SAELens(TrainSide):
    """`SAETrainer.step` of a TopK or BatchTopK training SAE, float32 or autocast to bfloat16."""

    def __init__(self, problem: Problem, kind: str = "topk", autocast: bool = False) -> None:
        saes = importlib.import_module(f"sae_lens.saes.{kind}_sae")
        name = {"topk": "TopK", "batchtopk": "BatchTopK"}[kind]
        k = problem.k if kind == "topk" else float(problem.k)
        shape = {"d_in": problem.d_in, "d_sae": problem.num_latents, "k": k}
        config = getattr(saes, f"{name}TrainingSAEConfig")(**shape, device="cpu", dtype="float32")
        self.sae = getattr(saes, f"{name}TrainingSAE")(config)
        self.sae.b_dec.data = problem.mean_D.clone()
        settings = importlib.import_module("sae_lens.config").SAETrainerConfig(
            total_training_samples=problem.batch * problem.steps,
            train_batch_size_samples=problem.batch,
            lr=problem.lr or 3e-4,
            lr_end=problem.lr or 3e-4,
            lr_warm_up_steps=problem.warmup_steps,
            lr_decay_steps=problem.decay_steps,
            dead_feature_window=min(1000, -(-problem.dead_after_tokens // problem.batch)),
            device="cpu",
            autocast=autocast,
        )
        trainer = importlib.import_module("sae_lens.training.sae_trainer").SAETrainer
        self.trainer = trainer(settings, self.sae, data_provider=iter(()))

    def step(self, x_ND: torch.Tensor) -> None:
        self.trainer.step(x_ND)
        self.trainer.n_training_steps += 1

    def reconstruct(self, x_ND: torch.Tensor) -> torch.Tensor:
        acts_NF, _ = self.sae.encode_with_hidden_pre(x_ND)
        return self.sae.decode(acts_NF)

    def save(self, folder: Path, scale: float) -> None:
        """As the library saves a finished SAE, with the scale of its rows folded in."""
        self.sae.fold_activation_norm_scaling_factor(scale)
        self.sae.save_inference_model(folder)


class DictionaryLearning(TrainSide):
    """`update` of the TopK or BatchTopK trainer. `threshold`: its average of the threshold begins after that share
    of the steps with this weight of the past (its own, from step 1000 with 0.999, is for long runs)."""

    def __init__(self, problem: Problem, kind: str = "topk", threshold: tuple[float, float] | None = None) -> None:
        module, name = {"topk": ("top_k", "TopKTrainer"), "batchtopk": ("batch_top_k", "BatchTopKTrainer")}[kind]
        trainer = getattr(importlib.import_module(f"dictionary_learning.trainers.{module}"), name)
        self.trainer = trainer(
            steps=problem.steps if problem.decay_steps else 10**9,
            activation_dim=problem.d_in,
            dict_size=problem.num_latents,
            k=problem.k,
            layer=0,
            lm_name="toy",
            lr=problem.lr,
            warmup_steps=problem.warmup_steps,
            decay_start=problem.steps - problem.decay_steps if problem.decay_steps else None,
            device="cpu",
        )
        self.trainer.dead_feature_threshold = problem.dead_after_tokens
        if threshold is not None:
            share, self.trainer.threshold_beta = threshold
            self.trainer.threshold_start_step = int(problem.steps * share)
        self.trainer.ae.b_dec.data = problem.mean_D.clone()
        self.done = 0

    def step(self, x_ND: torch.Tensor) -> None:
        self.done += 1  # step 0 would put a geometric median into b_dec
        self.trainer.update(self.done, x_ND)

    def reconstruct(self, x_ND: torch.Tensor) -> torch.Tensor:
        return self.trainer.ae.decode(self.trainer.ae.encode(x_ND, use_threshold=False))

    def save(self, folder: Path, scale: float) -> None:
        """As the library's `trainSAE` ends: the scale of the rows folded into the biases, `ae.pt` and `config.json`."""
        self.trainer.ae.scale_biases(1 / scale)
        torch.save(self.trainer.ae.state_dict(), folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({"trainer": self.trainer.config}))


LIBRARIES = {"sparsify": Sparsify, "saelens": SAELens, "dictionary_learning": DictionaryLearning}
PACKAGES = {"sparsify": "eai-sparsify", "saelens": "sae-lens", "dictionary_learning": "dictionary-learning"}
MODULES = {
    "sparsify": "sparsify.sparse_coder",
    "saelens": "sae_lens.training.sae_trainer",
    "dictionary_learning": "dictionary_learning.trainers.top_k",
}


def version(library: str) -> dict[str, Any]:
    return {"version": importlib.metadata.version(PACKAGES[library])}


def main() -> None:
    """Answer requests until the input ends. The library named on the command line is imported first: a peer's memory
    is counted above its imports."""

    with contextlib.redirect_stdout(sys.stderr):  # some greet at import; answers alone go to stdout
        for library in sys.argv[1:]:
            importlib.import_module(MODULES[library])
    serve_sides(Served(LIBRARIES), version=version)


if __name__ == "__main__":
    main()
