"""What commands there are: the settings each reads, its help, its examples. No heavy import here."""

from __future__ import annotations

from dataclasses import dataclass, fields

from .config import SAEConfig

NOT_READ = ("store.inputs", "store.format")  # settings of `ggscope store`
WRITING = ("store.buffer_bytes", "store.chunk_bytes", "store.shard_rows", "store.verify")  # of what makes a store
HELD_OUT = ("corpus.split", "corpus.max_tokens")  # for the commands that take the whole held-out text
MISMATCH = ("apply.allow_model_mismatch",)
# ... of a training, for the commands that take a finished SAE
TRAINING = tuple(f"sae.{field.name}" for field in fields(SAEConfig) if field.name != "path")


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    summary: str
    groups: tuple[str, ...] = ()  # config groups it reads
    examples: tuple[str, ...] = ()
    prompts: tuple[tuple[str, str], ...] = ()  # (flag, config key): texts that bypass Hydra's grammar
    verbs: tuple[str, ...] = ()  # the first word after the command
    verb_optional: bool = False  # without it the command does what it is named for
    path_key: str = ""  # config key of the path(s) that follow
    keeps_run: bool = True  # makes a run folder; those that only look do not
    continues: bool = False  # with resume= it goes on where it stopped; others start again in the same folder
    not_read: tuple[str, ...] = NOT_READ  # beginnings of settings of its groups that are another command's
    also_reads: tuple[str, ...] = ()  # settings of groups that are not its own


COMMANDS: dict[str, Command] = {
    "run": Command(
        summary="extract, train, evaluate, convert and report in one go",
        continues=True,
        groups=("model", "hook", "corpus", "store", "extract", "executor", "sae", "trainer", "logger", "evaluate", "convert", "report"),
        not_read=(*NOT_READ, "model.n_ctx", "sae.path", "convert.source", "evaluate.random_sae", "report.evaluation", "report.metrics"),
        examples=("ggscope run experiment=demo_cpu", "ggscope run experiment=demo_cpu model.path=my.gguf", "ggscope run resume=latest experiment=demo_cpu"),
    ),
    "extract": Command(
        summary="capture activations of a GGUF model into a zarr store",
        continues=True,
        groups=("model", "hook", "corpus", "store", "extract", "executor"),
        not_read=(*NOT_READ, "model.n_ctx"),
        examples=(
            "ggscope extract corpus.max_tokens=200000",
            "ggscope extract model.path=my.gguf 'hook.points=[blocks.12.hook_resid_post]' corpus=text 'corpus.paths=[notes/*.md]'",
            "ggscope extract 'hook.points=[blocks.*.hook_resid_post]' executor=pool executor.workers=2",
            "ggscope extract corpus=jsonl 'corpus.paths=[data/*.jsonl]' 'corpus.filter=[lang==en,score>=0.5]' store.path=s3://bucket/activations",
            "ggscope extract extract.plan_only=true corpus.max_tokens=200000",
            "ggscope extract resume=latest corpus.max_tokens=200000",
        ),
    ),
    "store": Command(
        summary="what a store holds, whether it is whole; several merged into one, one packed anew",
        groups=("store",),
        not_read=("store.buffer_bytes", "store.chunk_bytes", "store.verify"),
        examples=(
            "ggscope store info",
            "ggscope store info runs/extract/2026-01-31_12-00-00 format=json",
            "ggscope store verify s3://bucket/activations",
            "ggscope store merge first.zarr second.zarr store.path=both.zarr",
            "ggscope store compact partial.zarr store.path=whole.zarr store.shard_rows=65536",
        ),
        verbs=("info", "verify", "merge", "compact"),
        path_key="store.inputs",
        keeps_run=False,
    ),
    "train": Command(
        summary="fit a k-sparse autoencoder on a store, or on a capture running beside it",
        continues=True,
        groups=("store", "hook", "sae", "trainer", "together", "logger", "model", "corpus", "extract"),
        not_read=(*NOT_READ, "model.n_ctx", "sae.path", "store.verify", "extract.plan_only"),
        examples=("ggscope train sae.num_latents=4096 sae.k=32", "ggscope train 'together.k=[16,32,64]'", "ggscope train 'trainer.lr_search=[5e-4,1e-3,2e-3,4e-3]'", "ggscope train -m sae.k=16,32,64", "ggscope train sae.variant=batchtopk", "ggscope train sae.kind=transcoder 'sae.inputs=[blocks.3.hook_resid_mid]' 'sae.outputs=[blocks.3.hook_mlp_out]'", "ggscope train store.path=runs/extract/2026-01-31_12-00-00/activations.zarr", "ggscope train trainer.source=stream model.path=my.gguf 'hook.points=[blocks.12.hook_resid_post]' corpus=text 'corpus.paths=[notes/*.md]'"),
    ),
    "evaluate": Command(
        summary="FVU, L0, dead share, and CE recovered inside llama.cpp, on held-out text beside baselines",
        groups=("model", "corpus", "store", "sae", "evaluate"),
        also_reads=MISMATCH,
        not_read=(*NOT_READ, *TRAINING, *WRITING, *HELD_OUT, "model.n_ctx", "evaluate.random_model_tokens"),
        examples=("ggscope evaluate", "ggscope evaluate sae.path=runs/train/2026-01-31_12-00-00/sae evaluate.splice_tokens=8192", "ggscope evaluate sae.path=block3/sae 'evaluate.also=[block1/sae,block5/sae]'", "ggscope evaluate evaluate.against=other_seed/sae evaluate.probe=labelled.csv"),
    ),
    "drift": Command(
        summary="the SAE over its model in several quantisations, and itself in several types: FVU, L0, CE recovered, overlap",
        groups=("model", "corpus", "sae", "drift"),
        also_reads=MISMATCH,
        not_read=(*NOT_READ, *TRAINING, *HELD_OUT, "model.n_ctx"),
        examples=(
            "ggscope drift 'drift.requantise=[Q8_0,Q4_K_M,Q4_0]'",
            "ggscope drift model.path=model-F16.gguf 'drift.models=[model-Q8_0.gguf,model-Q4_K_M.gguf]' 'drift.types=[F16,Q8_0,Q4_0/Q8_0]'",
        ),
    ),
    "convert": Command(
        summary="write an SAE, ours or a published one, as GGUF and verify it; a latent as a control vector",
        groups=("model", "corpus", "sae", "convert"),
        verbs=("verify",),
        verb_optional=True,
        path_key="sae.path",
        also_reads=MISMATCH,
        not_read=(*NOT_READ, *TRAINING, *HELD_OUT, "model.n_ctx"),
        examples=("ggscope convert convert.encoder_type=Q8_0 convert.decoder_type=Q4_0", "ggscope convert convert.labels=labels.json 'convert.also=[block1/sae,block5/sae]'", "ggscope convert verify sae.gguf convert.source=runs/train/2026-01-31_12-00-00", "ggscope convert convert.source=hf://google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71 model.path=gemma-2-2b.gguf", "ggscope convert convert.latent=123 convert.coeff=4"),
    ),
    "apply": Command(
        summary="generate with live features per token; steer, clamp or ablate latents, switch attention heads off",
        groups=("model", "sae", "apply", "intervention"),
        not_read=(*NOT_READ, *TRAINING),
        examples=(
            "ggscope apply --prompt 'def read_file(path):'",
            "ggscope apply --prompt 'import os' intervention=steer 'intervention.latents=[123]' intervention.coeff=8",
            "ggscope apply --prompt 'import os' 'apply.also=[other.gguf]' 'apply.interventions=[{kind:steer,latents:[5],coeff:8},{kind:clamp,sae:other.gguf,latents:[7],value:3}]'",
            "ggscope apply --prompt 'import os' intervention=heads 'intervention.heads=[L3H5,L4H*]'",
            "echo 'class Node:' | ggscope apply - apply.format=jsonl",
        ),
        prompts=(("--prompt", "apply.prompt"),),
    ),
    "cvector": Command(
        summary="a weighted sum of latents, over one block or several, as a stock llama.cpp control vector",
        groups=("model", "sae", "cvector"),
        also_reads=MISMATCH,
        not_read=(*NOT_READ, *TRAINING, "model.n_ctx"),
        examples=(
            "ggscope cvector 'cvector.latents=[123,7]' 'cvector.coeffs=[8,-2]'",
            "ggscope cvector 'cvector.latents=[123]' 'cvector.coeffs=[8]' 'cvector.directions=[{sae:other.gguf,latents:[5],coeffs:[3]}]'",
        ),
    ),
    "lens": Command(
        summary="logit lens: what every block would predict, through the model's own norm and unembedding",
        groups=("model", "lens"),
        examples=("ggscope lens --prompt 'for i in range(10):'", "ggscope lens --prompt 'for i in range(10):' 'lens.attention=[0,3]'"),
        prompts=(("--prompt", "lens.prompt"),),
    ),
    "heads": Command(
        summary="head ablation: what each attention head does for the next token after a prompt",
        groups=("model", "heads"),
        examples=(
            "ggscope heads --prompt 'for name in names: print('",
            "ggscope heads --prompt 'for name in names: print(' --answer name --wrong names",
            "ggscope heads --prompt 'for name in names: print(' heads.mean=runs/extract/2026-01-31_12-00-00/activations.zarr",
        ),
        prompts=(("--prompt", "heads.prompt"), ("--answer", "heads.answer"), ("--wrong", "heads.wrong")),
    ),
    "latents": Command(
        summary="what each active latent of the SAE does for the next token after a prompt, by switching it off",
        groups=("model", "sae", "latents"),
        also_reads=(*MISMATCH, "apply.encoder"),
        not_read=(*NOT_READ, *TRAINING),
        examples=(
            "ggscope latents --prompt 'for name in names: print('",
            "ggscope latents --prompt 'for name in names: print(' --answer name --wrong names sae.path=sae.gguf latents.most=0",
        ),
        prompts=(("--prompt", "latents.prompt"), ("--answer", "latents.answer"), ("--wrong", "latents.wrong")),
    ),
    "patch": Command(
        summary="activation patching between a clean and a corrupted prompt, by position or by attention head",
        groups=("model", "patch"),
        examples=(
            "ggscope patch --clean 'for name in names: print(' --corrupted 'for path in paths: print(' --answer 'name' --wrong 'path'",
            "ggscope patch patch.heads=true --clean 'for name in names: print(' --corrupted 'for path in paths: print(' --answer 'name' --wrong 'path'",
        ),
        prompts=(("--clean", "patch.clean"), ("--corrupted", "patch.corrupted"), ("--answer", "patch.answer"), ("--wrong", "patch.wrong")),
    ),
    "report": Command(
        summary="one HTML file: training curve, evaluation, latents with their contexts, lens, steering",
        groups=("model", "corpus", "sae", "report"),
        also_reads=MISMATCH,
        not_read=(*TRAINING, *HELD_OUT, "model.n_ctx"),
        examples=("ggscope report", "ggscope report report.steer_latent=123"),
    ),
    "compare": Command(
        summary="a table of train runs, and FVU and CE recovered over L0 as a picture",
        groups=("compare",),
        examples=("ggscope compare", "ggscope compare runs/train/2026-01-31_12-00-00 runs/sweeps/2026-01-31_13-00-00-train", "ggscope compare format=json"),
        path_key="compare.runs",
    ),
    "inspect": Command(
        summary="a model's card, and the tensors and hook points of its real graph",
        groups=("model", "inspect"),
        not_read=("model.n_ctx",),
        examples=("ggscope inspect", "ggscope inspect my.gguf inspect.tensors=true", "ggscope inspect my.gguf format=json"),
        path_key="model.path",
        keeps_run=False,
    ),
    "doctor": Command(summary="versions, backends, threads, GPU, disk: what this installation can do", examples=("ggscope doctor",)),
    "completion": Command(summary="print a completion script for bash, zsh or fish", examples=("ggscope completion bash >> ~/.bashrc",)),
}  # fmt: skip
