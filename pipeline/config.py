"""Every setting of every command, typed and frozen. Domain code sees these classes, never a DictConfig.

The yaml files of `conf/` give the defaults people read; the classes check types and names, `ranges.py` the values.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The GGUF model and how llama.cpp runs it."""

    path: str = ""  # a .gguf file; empty (and no repo): the embedded demo model
    repo: str = ""  # or a hub repository ...
    file: str = ""  # ... and the file in it
    n_threads: int = 0  # 0: all cores
    n_gpu_layers: int = 0  # -1: all
    mmap: bool = True  # false: read a whole file instead, which saves memory where llama.cpp repacks weights (Q4_0)
    n_ctx: int = 0  # 0: what the command needs
    kv_type: str = "f16"  # of the KV cache
    flash_attn: str = "auto"  # attention in one operation; patterns need it off


@dataclass(frozen=True, kw_only=True, slots=True)
class HookConfig:
    """Hook points by the field's names, blocks counted from 0; `*` and ranges (`blocks.2..5.`) stand for several."""

    points: list[str] = field(default_factory=list)  # e.g. blocks.3.hook_resid_post; `ggscope inspect` lists them


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """Documents and how they are cut into windows."""

    kind: str = "stdlib"  # where documents come from; stdlib: the interpreter's own modules
    paths: list[str] = field(default_factory=list)  # files, globs and fsspec URLs
    text_key: str = "text"  # the field or column of a record that holds the text
    messages_key: str = ""  # ... or the one that holds chat messages, for the model's own chat template
    filter: list[str] = field(default_factory=list)  # conditions on fields, all must hold: [lang==en,score>=0.5]
    dataset: str = ""  # kind datasets: what datasets.load_dataset takes (a name, or json, parquet, ... with paths)
    dataset_config: str = ""  # ... and its configuration
    dataset_split: str = "train"  # ... and its split
    token_dtype: str = "uint16"  # kind tokens: how an id is stored
    split: str = "train"  # which documents: those to train on, those held out, or all
    context_tokens: int = 256  # window length, BOS included
    max_tokens: int = 0  # rows in all, 0: no limit
    max_documents: int = 0  # 0: no limit
    packing: str = (
        "documents"  # documents: one window never crosses a document; concat: windows cut from all of them joined
    )
    bos: str = "auto"  # at the start of a window; auto: where the model adds one
    seed: int = 0  # order in which documents are taken; decides which ones a limit keeps
    generate_tokens: int = 0  # > 0: each document is a prompt, its rows go on with that many generated tokens
    generate_temperature: float = 0.0  # 0: the likeliest token


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig:
    path: str = (
        ""  # a folder or s3://bucket/prefix; empty: extract makes one in its run folder, other commands take the newest
    )
    buffer_bytes: int = 1 << 30  # two shard buffers of all hooks fit in it
    chunk_bytes: int = 512 << 10  # of one zarr chunk
    shard_rows: int = 0  # 0: chosen from buffer_bytes
    verify: bool = False  # on resume compare the sha256 of every committed shard too, not only the sizes
    inputs: list[str] = field(default_factory=list)  # `ggscope store merge A B store.path=OUT`: the stores to read
    format: str = "text"  # of `ggscope store info`


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractConfig:
    dtype: str = "auto"  # of stored values; auto: float16 where they fit in it, else bfloat16
    backend: str = "auto"  # layer_inp: inputs of blocks without a callback; auto: the faster one
    load: str = "auto"  # auto: only the blocks that the hook points need, where that gives the same bits
    plan_only: bool = False  # print rows, bytes, seconds and free disk, and stop
    batch_tokens: int = 2048  # tokens of one llama_decode
    ubatch_tokens: int = 512  # ... computed at a time
    calibration_tokens: int = 8192  # rows computed first, for the outlier limit and the dtype
    outlier_factor: float = 10.0  # a row is an outlier above this multiple of the median norm


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorConfig:
    """Where the shards of a store are captured: in this process, in several, on a Ray or a SLURM cluster."""

    kind: str = "local"  # pool: processes of this machine
    workers: int = 0  # 0: one for each GPU, else one for each two cores (ray: for each node of the cluster)
    threads_per_worker: int = 0  # 0: the machine's cores shared out
    gpus_per_worker: float = 0.0  # pool, ray
    retries: int = 3  # of shards whose worker died
    address: str = ""  # ray: the cluster's address; empty: one made on this machine
    cluster: str = ""  # submitit; empty: slurm where it is installed
    partition: str = ""  # submitit: SLURM's
    account: str = ""  # submitit: SLURM's
    timeout_minutes: int = 240  # submitit: of a job
    memory_gb: int = 16  # submitit: of a job
    folder: str = ""  # submitit: its job files; empty: in the run folder


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig:
    tensors: bool = False  # every node of the graph, not only those with a hook point
    format: str = "text"  # json: for programs


@dataclass(frozen=True, kw_only=True, slots=True)
class SAEConfig:
    path: str = ""  # a checkpoint folder or an SAE GGUF; empty: the newest; none: apply reads none
    num_latents: int = 4096  # F, the size of the dictionary
    k: int = 32  # active latents of a row
    seed: int = -1  # of the initial weights; -1: trainer.seed, which also orders the rows
    variant: str = "topk"  # how latents are chosen
    kind: str = "sae"  # what it reconstructs: its own hook point, several, or another one
    inputs: list[str] = field(default_factory=list)  # hook points read, where there are several or another is written
    outputs: list[str] = field(default_factory=list)  # transcoder, cross_layer: hook points reconstructed
    skip: bool = False  # transcoder: a linear map of the input beside the latents
    init_from: str = ""  # start from this SAE: a checkpoint or run folder, a GGUF, or a published one as convert.source
    decoder_rows: str = "unit"  # topk, batchtopk, relu; free: not renormalised, selection by pre * ||W_dec||
    input_norm: str = "dataset"  # one scale, folded on export; layer: each row by its own sigma
    b_dec_init: str = "mean"  # of the rows
    k_start: int = 0  # topk, batchtopk, matryoshka: k falls from here to k ...
    k_anneal_share: float = 0.1  # ... over this share of the steps
    multi_k: int = 0  # topk: also reconstruct from so many latents (Multi-TopK) ...
    multi_coef: float = 0.125  # ... at this weight
    prefixes: list[int] = field(default_factory=list)  # matryoshka: nested sizes; empty: F/16, F/8, F/4, F/2
    l1_coef: float = 2.0  # relu, gated; more for wider activations: 5 for thousands of dimensions
    l0_coef: float = 1e-3  # jumprelu
    sparsity_warmup_share: float = 0.05  # relu, gated, jumprelu: the penalty grows over this share of the steps
    threshold_start: float = 2.0  # jumprelu, in standard deviations of the first pre-activations
    bandwidth: float = 0.5  # jumprelu, in units of sqrt(E||x - mean||^2 / D)
    init_scale: float = 0.0  # W_enc starts as this times W_dec; 0: half of the factor that reconstructs best


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerConfig:
    source: str = "store"  # stream: capture while training, without a store
    queue_batches: int = 8  # stream: decoded batches that may wait for the trainer
    tokens: int = 4_000_000  # rows trained on, repeats of the store included
    batch_tokens: int = 2048  # rows of a step
    lr: float = 2e-3  # learning rate
    warmup_steps: int = 100  # at most a quarter of the steps
    decay_share: float = 0.35  # linear decay to zero over the last share of the steps
    beta1: float = 0.8  # Adam's
    beta2: float = 0.999  # Adam's
    eps: float = 1e-8  # Adam's
    optimizer: str = "adam"  # or trainer=signum, trainer=muon with their own rates
    momentum: float = 0.95  # of signum and muon
    auxk_coef: float = 1 / 32  # weight of the loss that revives dead latents
    auxk_k: int = 0  # 0: d_in / 2
    dead_after_tokens: int = 0  # 0: a twentieth of trainer.tokens, at most 10M
    encoder_dtype: str = "auto"  # of the product that names latents to choose from
    auxk_dtype: str = "auto"  # of AuxK's matrix products
    kernel: str = "auto"  # what computes a step; auto: the fastest there is
    parallel: str = "data"  # under torchrun: ranks share the rows of a batch (data) or the latents (latent)
    buffer_rows: int = 131_072  # mixing buffer of the shuffled reader
    checkpoint_steps: int = 500  # steps between checkpoints; 0: only the last
    keep_last: int = 2  # checkpoints kept
    save_best: bool = False  # also keep the checkpoint of the lowest FVU, as the SAE `sae_best`
    lr_search: list[float] = field(default_factory=list)  # learning rates to try first; the best is taken as lr
    lr_search_share: float = 0.02  # ... on this share of the tokens
    log_steps: int = 20  # steps between lines of metrics.jsonl
    n_threads: int = 0  # 0: all cores
    device: str = "auto"  # auto: a GPU where torch has one
    seed: int = 0  # of the order of rows, and of initial weights


@dataclass(frozen=True, kw_only=True, slots=True)
class TogetherConfig:
    """Several SAEs on the same batches in one process: every combination of the values given here."""

    variant: list[str] = field(default_factory=list)  # values to combine
    num_latents: list[int] = field(default_factory=list)  # values to combine
    k: list[int] = field(default_factory=list)  # values to combine
    lr: list[float] = field(default_factory=list)  # values to combine
    seed: list[int] = field(default_factory=list)  # of the initial weights; the rows come in one order


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggerConfig:
    """JSONL is always written; these come beside it."""

    tensorboard: bool = False  # metrics in the run folder
    wandb: bool = False  # needs its package
    mlflow: bool = False  # needs its package
    trackio: bool = False  # needs its package
    project: str = "ggscope"  # the project of wandb and trackio, the experiment of mlflow
    mlflow_uri: str = ""  # empty: a database in the run folder


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    tokens: int = 500_000  # rows for the reconstruction metrics; 0: all that are held out
    splice_tokens: int = (
        65_536  # rows for CE and KL, each run several times through the model; 0: all that are held out
    )
    baselines: bool = True  # PCA, an untrained SAE (transcoders: linear maps), mean and zero ablation beside it
    random_sae: str = ""  # an SAE trained on the same architecture with re-drawn weights (`run` makes one)
    random_model_tokens: int = 300_000  # rows captured for it
    also: list[str] = field(default_factory=list)  # SAEs at other hook points, spliced together with sae.path
    against: str = ""  # an SAE of the same hook point and width: how many latents both found (needs scipy)
    probe: str = ""  # a CSV of texts and labels: k-sparse probing (needs scikit-learn)
    probe_text: str = "text"  # its column of texts ...
    probe_label: str = "label"  # ... and of labels
    probe_k: list[int] = field(default_factory=lambda: [1, 2, 5])  # latents that a probe may use
    probe_test_share: float = 0.2  # of each label's texts, held out
    structure_latents: int = 16_384  # latents whose nearest neighbour is searched among all; 0: every one
    seed: int = 0  # of which rows and windows


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftConfig:
    """One SAE over quantisations of its model, and itself in the types of a file."""

    models: list[str] = field(default_factory=list)  # further GGUF files of the model in model.path
    requantise: list[str] = field(default_factory=list)  # types that llama.cpp makes of an F32, F16 or BF16 model.path
    types: list[str] = field(default_factory="F32 F16 BF16 Q8_0 Q5_1 Q4_1 Q4_0".split)  # ... or ENCODER/DECODER
    encoder: str = "auto"  # what computes the latents, as apply.encoder
    tokens: int = 32_768  # rows for FVU, L0 and overlap
    splice_tokens: int = 16_384  # rows for CE, each run through the model once for each type and three times more
    copies_bytes: int = 2 << 30  # of the SAE in several types, held at once
    seed: int = 0  # of which rows
    format: str = "text"  # json: for programs


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    source: str = (
        ""  # checkpoint folder, published SAE (folder, file, hf://owner/repo/path); empty: the newest train run
    )
    format: str = ""  # of a published SAE; empty: recognised by its files
    hook: str = ""  # of a published SAE whose hook point is not said or not known here
    hook_out: str = ""  # ... of a transcoder: what it reconstructs
    also: list[str] = field(default_factory=list)  # further SAEs of this model, into the same file
    labels: str = ""  # a JSON file of latents' labels, written into the file
    out: str = ""  # empty: in the run folder
    export: str = ""  # also write it as a folder that another library loads
    encoder_type: str = "F16"  # of W_enc in the file
    decoder_type: str = "F16"  # of W_dec in the file
    thresholds: str = "none"  # of a top-k SAE, fitted on the probe rows: one for all, or one for each latent
    latent: int = -1  # >= 0: write this latent as a control vector beside the SAE
    coeff: float = 1.0  # its raw scale
    probe_tokens: int = 4096  # rows that the file is verified on


@dataclass(frozen=True, kw_only=True, slots=True)
class InterventionConfig:
    """One change of the forward pass, by latents of an SAE or by attention heads."""

    kind: str = "none"  # what is done with the latents, or heads
    latents: list[int] = field(default_factory=list)  # which ones
    sae: str = ""  # whose latents; empty: sae.path
    coeff: float | None = None  # steer: x' = x + coeff W_dec[f]; intervention=steer takes 8 where none is given
    coeffs: list[float] = field(default_factory=list)  # ... or one for each latent
    value: float | None = None  # clamp: the activation aimed at
    values: list[float] = field(default_factory=list)  # ... or one for each latent
    keep_error: bool = False  # reconstruct: add the SAE error, which gives the clean run up to rounding
    phase: str = "all"  # of the prompt's tokens, the generated ones, or all
    positions: list[int] = field(default_factory=list)  # empty: every position of the phase
    token_range: list[int] = field(default_factory=list)  # [first, last] instead of naming each position
    hook: str = ""  # another hook point of the same width, e.g. blocks.4.hook_resid_post; empty: the SAE's own
    heads: list[str] = field(default_factory=list)  # heads: attention heads switched off, L3H5; L3H*: all of block 3
    keep: bool = False  # heads: keep these and switch off the others of their blocks
    mean: str = ""  # heads: a store whose mean takes their place, captured at attn.hook_z; empty: zeros


@dataclass(frozen=True, kw_only=True, slots=True)
class ApplyConfig:
    prompt: str = ""  # set by --prompt / --prompt-file / -
    also: list[str] = field(default_factory=list)  # SAEs at other hook points, read beside sae.path
    interventions: list[InterventionConfig] = field(default_factory=list)  # further ones, after `intervention`
    max_tokens: int = 48  # generated at most
    temperature: float = 0.0  # 0: the likeliest token
    top_latents: int = 3  # shown for each token
    encoder: str = "auto"  # what computes the latents; numpy: the general path
    seed: int = 0  # of the sampling
    chat: bool = False  # the prompt as a user's message, by the model's own template
    allow_model_mismatch: bool = False  # use an SAE of another model all the same
    format: str = "text"  # json: for programs


@dataclass(frozen=True, kw_only=True, slots=True)
class LensConfig:
    prompt: str = ""  # set by --prompt / --prompt-file / -
    top: int = 3  # tokens shown at each position of each block
    attention: list[int] = field(default_factory=list)  # blocks whose patterns are kept; flash attention is off then
    format: str = "text"  # json: for programs


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadsConfig:
    prompt: str = ""  # set by --prompt / --prompt-file / -
    answer: str = ""  # the next token looked at, also --answer; empty: the likeliest
    wrong: str = ""  # another one, also --wrong: the logit difference is measured, not the log-probability
    blocks: list[int] = field(default_factory=list)  # empty: all with attention heads
    mean: str = ""  # a store whose mean takes a head's place, captured at attn.hook_z; empty: zeros
    top: int = 12  # heads shown
    format: str = "text"  # json: for programs


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentsConfig:
    prompt: str = ""  # set by --prompt / --prompt-file / -
    answer: str = ""  # the next token looked at, also --answer; empty: the likeliest
    wrong: str = ""  # another one, also --wrong: the logit difference is measured, not the log-probability
    most: int = 256  # latents switched off, those of the tokens that matter first; 0: all that fire
    top: int = 12  # latents shown
    format: str = "text"  # json: for programs


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchConfig:
    clean: str = ""  # a prompt, also --clean
    corrupted: str = ""  # another one, also --corrupted
    answer: str = ""  # the token the clean prompt calls for
    wrong: str = ""  # the token the corrupted prompt calls for
    site: str = "hook_resid_post"  # the hook point that is patched in every block
    heads: bool = False  # every attention head at all positions, instead of positions of `site`
    format: str = "text"  # json: for programs


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    top_latents: int = 40  # latents shown with their contexts
    contexts: int = 8  # strongest contexts of a latent
    tokens: int = 200_000  # rows searched for them
    prompt: str = ""  # that the report steers and looks into; empty: one of its own
    steer_latent: int = -1  # -1: chosen
    evaluation: str = ""  # evaluation.json; empty: of the newest evaluate run
    metrics: str = ""  # metrics.jsonl of the training; empty: of the newest train run


@dataclass(frozen=True, kw_only=True, slots=True)
class DirectionConfig:
    """Latents of one SAE, summed into a direction."""

    sae: str = ""  # a checkpoint folder or an SAE GGUF; empty: sae.path
    latents: list[int] = field(default_factory=list)
    coeffs: list[float] = field(default_factory=list)  # raw scale, one for each latent
    block: int = -1  # whose output is steered; -1: that of the SAE's hook point


@dataclass(frozen=True, kw_only=True, slots=True)
class CVectorConfig:
    """A control vector: sums of latents' decoder rows, one for each block."""

    latents: list[int] = field(default_factory=list)  # of sae.path
    coeffs: list[float] = field(default_factory=list)  # raw scale, one for each latent
    directions: list[DirectionConfig] = field(default_factory=list)  # further ones, of this SAE or others
    out: str = ""  # empty: in the run folder


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig:
    runs: list[str] = field(default_factory=list)  # train, whole and evaluate runs, sweeps, folders of them; empty: all
    format: str = "text"  # json: for programs


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """`-m`: every combination (`sweep=grid`), or a search (`sweep=optuna`)."""

    trials: int = 0  # > 0: that many points, proposed by Optuna, with or without sweep=optuna
    metric: str = "fvu"  # of the run's manifest
    maximize: bool = False  # whether more of it is better
    seed: int = 0  # of Optuna


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The union of all settings. All commands share it, so that one experiment file describes a whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    hook: HookConfig = field(default_factory=HookConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    inspect: InspectConfig = field(default_factory=InspectConfig)
    sae: SAEConfig = field(default_factory=SAEConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    together: TogetherConfig = field(default_factory=TogetherConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    drift: DriftConfig = field(default_factory=DriftConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    intervention: InterventionConfig = field(default_factory=InterventionConfig)
    apply: ApplyConfig = field(default_factory=ApplyConfig)
    cvector: CVectorConfig = field(default_factory=CVectorConfig)
    lens: LensConfig = field(default_factory=LensConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    patch: PatchConfig = field(default_factory=PatchConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    run_dir: str = ""
    resume: str = ""
