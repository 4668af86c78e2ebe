"""The typed sections of a run's YAML file.

Every field carries its meaning, unit and default; what one field demands of another is in `rules`. Values are
checked strictly (a quoted ``"3"`` is not a number) and the sections are immutable once loaded.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_ultraep.config import BalanceConfig, option_help
from rl.config.algorithm import AlgorithmSection
from rl.config.base import ConfigPath, ImportPath, Seconds, Section, Texts
from rl.config.data import DataSection, EvaluationSection, RewardSection
from rl.config.fusion import FuseSection
from rl.config.planning import PlanSection
from rl.config.profile import ProfileSection
from rl.config.trainer import CriticSection, ParallelSection, ReferenceSection, TrainerSection

Dtype = Literal["float32", "bfloat16", "float64"]


class Limits(Section):
    """How long the run waits for each kind of work before it stops and names who was waited for."""

    engine_start_s: Seconds = Field(600.0, description="Seconds until a rollout engine is up, imports included.")
    actor_start_s: Seconds = Field(300.0, description="Seconds until a trainer rank is up, imports included.")
    generate_s: Seconds = Field(900.0, description="Seconds for one rollout iteration's (or evaluation's) generation.")
    train_step_s: Seconds = Field(900.0, description="Seconds for one training call on all ranks.")
    weight_update_s: Seconds = Field(300.0, description="Seconds to send new weights to all engines.")
    checkpoint_s: Seconds = Field(600.0, description="Seconds to write or read one checkpoint.")
    collective_s: Seconds = Field(300.0, description="Seconds before a collective between trainer ranks times out.")


class RunSection(Section):
    """Name, place, length and seed of the run."""

    name: str = Field(min_length=1, pattern=r"^[\w.\-]+$", description="Name of the run; part of paths.")
    output_dir: ConfigPath | None = Field(None, description="Run directory; default `runs/<run.name>`.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of sampling, shuffling and everything else unnamed.")
    steps: int | None = Field(None, ge=1, description="Rollout iterations to run; null: as many as `epochs` gives.")
    epochs: int = Field(1, ge=1, description="Passes over `data.train`; only used when `steps` is null.")
    limits: Limits = Field(default_factory=Limits, description="Seconds to wait for each kind of work.")

    @model_validator(mode="before")
    @classmethod
    def _default_output_dir(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("output_dir") is None and isinstance(raw.get("name"), str):
            return {**raw, "output_dir": f"runs/{raw['name']}"}
        return raw


class ModelSection(Section):
    """The model to train, a Hugging Face directory, or how to make one."""

    path: ConfigPath = Field(description="Hugging Face directory (config.json, safetensors, tokenizer).")
    create: ImportPath | None = Field(
        None, description="`module:function` called as f(path=..., **create_args) when the directory does not exist."
    )
    create_args: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of `create`.")
    dtype: Dtype = Field("bfloat16", description="Parameter and compute type of the trainer; float64 is for tests.")
    float32_head: bool = Field(
        True,
        description="Logits of a bfloat16 model are added up and kept in float32, in engines and trainer; rounding is "
        "much of what their log-probs differ by.",
    )
    float32_residual: bool = Field(
        False,
        description="The residual stream of a bfloat16 model stays in float32, in engines and trainer, which halves "
        "what is left of that difference; costs memory (2 bytes per hidden unit, token and norm) and time.",
    )


class ForcedLengths(Section):
    """Log-normal response lengths by prompt, at most `sampling.max_tokens`. What follows a response's end-of-sequence
    token is neither rewarded nor learnt from: it only takes time."""

    median: float = Field(gt=0, description="Median length in tokens.")
    sigma: float = Field(1.0, ge=0, description="Standard deviation of the logarithm of lengths.")


class SamplingSection(Section):
    """How responses are sampled during training (evaluation has `evaluation.greedy`)."""

    temperature: float = Field(1.0, gt=0, description="Logits are divided by it, in rollout and in training alike.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus size; only 1.0 (off) is supported.")
    top_k: int = Field(0, ge=0, description="Number of likeliest tokens kept; only 0 (off) is supported.")
    max_tokens: int = Field(256, ge=1, description="Longest response in tokens.")
    stop: Texts = Field((), description="Texts that end a response besides the end-of-sequence token.")
    forced_lengths: ForcedLengths | None = Field(
        None, description="Benchmarks: how long responses are, whatever the model says; null: as long as they become."
    )


class RolloutSection(Section):
    """The vLLM engines."""

    engines: int = Field(1, ge=1, description="Number of engines, each a Ray actor.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="What the engines run on.")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="Type of the engines' weights; null: `model.dtype`, and float32 when that is float64."
    )
    max_model_len: int = Field(1024, ge=2, description="Longest prompt plus response in tokens.")
    max_num_seqs: int = Field(64, ge=1, description="Sequences that one engine computes at the same time.")
    kv_cache_gib: float = Field(1.0, gt=0, description="GiB of key-value cache of each rank of an engine.")
    block_size: int = Field(32, ge=1, description="Tokens in a key-value cache block.")
    tensor_parallel: int = Field(1, ge=1, description="Tensor-parallel ranks of each engine, on one node.")
    cuda_graphs: bool = Field(
        True, description="Engines on GPUs replay decoding steps as CUDA graphs, captured at the start; false: eager."
    )
    max_regenerations: int = Field(
        3, ge=0, description="How often a sample refused for bad routes is generated again before the run stops."
    )
    capture_routes: bool = Field(True, description="Return each token's experts; must be false for dense models.")


class BalanceSection(Section):
    """Balancing of experts in the trainer (UltraEP); the fields are those of ``megatron_ultraep.BalanceConfig``."""

    enabled: bool = Field(False, description="Balance experts in every micro-batch of every MoE layer.")
    slots: int = Field(2, description=option_help("slots"))
    node_size: int = Field(0, description=option_help("node_size"))
    min_tokens: int = Field(1024, description=option_help("min_tokens"))
    tolerance: float = Field(0.01, description=option_help("tolerance"))
    gate: bool = Field(True, description=option_help("gate"))
    slot_sets: int = Field(1, description=option_help("slot_sets"))
    token_ns: int = Field(0, description=option_help("token_ns"))
    copy_ns_per_mib: int = Field(0, description=option_help("copy_ns_per_mib"))
    transport: Literal["auto", "collective", "symmetric"] = Field("auto", description=option_help("transport"))
    record: bool = Field(
        True, description="Write load records to the directory `balance` of the run; see ultraep-view."
    )
    record_mib: int = Field(256, description=option_help("record_mib"))
    foresight: bool = Field(
        False,
        description="Plan every pass that replays routes before it starts, in a process of its own; passes of other "
        "routers are planned on exact loads.",
    )
    reorder: bool = Field(
        False,
        description="Between iterations, move experts to other ranks, optimizer states included, so that nodes are "
        "balanced for the coming batch, and ranks where copies cannot do it.",
    )
    reorder_by: Literal["coming", "previous"] = Field(
        "coming",
        description="Which routes choose homes: those of the coming batch, then experts move between rollout and "
        "training; or those of the iteration before, then they move while engines generate, and nobody waits.",
    )
    reorder_every: int = Field(1, ge=1, description="Iterations between choices of homes.")
    reorder_horizon: int = Field(
        1, ge=1, le=1024, description="Iterations for which loads like those of the coming batch are expected; an "
        "expert moves only where it pays within them.",
    )  # fmt: skip
    move_ns_per_mib: int = Field(
        25_000, ge=0, le=10**9,
        description="Time that a link is held up by 1 MiB of an expert that moves to another node (ns); 25,000 is a "
        "network of 400 Gbit/s a GPU. Inside a node a move is weighed like a copy.",
    )  # fmt: skip
    compose: bool = Field(
        False,
        description="Compose training's micro-batches so that their expert loads balance; the gradient is the same.",
    )

    def settings(self, run: Path, *, allow_untested: bool = False) -> BalanceConfig:
        """What the trainer's ranks are given.

        Args:
            run: directory of the run.
            allow_untested: go on with versions that were not tested.

        Raises:
            ValueError: fields out of range, or that contradict each other.
        """
        record = str((run / "balance").absolute()) if self.record and self.enabled else ""
        own = {field.name: getattr(self, field.name) for field in fields(BalanceConfig) if hasattr(self, field.name)}
        return BalanceConfig(**own | {"record": record, "allow_untested": allow_untested})


class ElasticSection(Section):
    """Engines that come and go between steps."""

    max_engines: int | None = Field(
        None, ge=1, description="Most engines; more than `rollout.engines` are added while generation lags, and given "
        "back when it does not; null: as many as there are, always.",
    )  # fmt: skip
    horizon: int = Field(
        20, ge=1, description="Iterations within which an added engine must have saved more than its start costs."
    )


class StreamSection(Section):
    """How generation and training overlap (StreamRL); the defaults are the plain synchronous loop."""

    staleness: int = Field(
        0,
        ge=0,
        description="Training steps that samples may be old: 0 synchronous, 1 one-step asynchronous, n. From 1 on the "
        "next batches are generated while this one trains, and weights travel beside both.",
    )
    pipelining: bool = Field(
        False,
        description="Train on groups as they arrive; the optimizer still steps once per mini-batch, with the same "
        "gradient. Mini-batches are then cut by the order of prompts.",
    )
    chunk_tokens: int = Field(
        0, ge=0, description="Tokens that must have arrived before a chunk trains; 0: as many as fill one micro-batch "
        "on every data-parallel rank (times pipeline stages).",
    )  # fmt: skip
    buffer_groups: int = Field(
        0, ge=0, description="Finished groups of a batch that may wait for the trainer before engines get no more of "
        "it; 0: no limit but the batch.",
    )  # fmt: skip
    in_flight: Literal["finish", "continue"] = Field(
        "finish",
        description="Samples that run when new weights come: finish on the old ones, engine by engine; or go on under "
        "the new ones, tokens kept, each token with its version.",
    )
    dispatch: Literal["fcfs", "random", "longest_first", "skew_aware"] = Field(
        "fcfs", description="Which group goes to which engine; the last two need a `predictor`."
    )
    long_fraction: float = Field(
        0.2, gt=0, lt=1, description="Share of a batch that `skew_aware` isolates: the longest predicted."
    )
    predictor: Literal["none", "features", "history", "ranker"] = Field(
        "none", description="How response lengths are predicted, learnt while the run goes."
    )
    latency_profile: ConfigPath | None = Field(
        None, description="Measured latency of one engine, a file of scripts/measure_latency.py; `skew_aware` needs it."
    )
    transfer: Literal["auto", "store", "nccl", "gloo", "ipc"] = Field(
        "auto",
        description="How weights travel: by Ray's object store (`store`), or directly from trainer ranks to engines: "
        "`nccl` between GPUs, `gloo` between CPUs, `ipc` for colocated engines, each reading memory of the rank "
        "beside it. `auto`: between GPUs directly wherever that can be, else the store. Engines that start later take "
        "a copy from the store.",
    )
    max_restarts: int = Field(3, ge=0, description="Engines that may die and be replaced during a run.")
    colocated: bool = Field(
        False,
        description="Engines and trainer ranks share GPUs in turns: engines sleep while the trainer works, and it "
        "leaves the GPU while they generate.",
    )
    elastic: ElasticSection = Field(default_factory=ElasticSection, description=ElasticSection.__doc__)
    timeline: bool = Field(True, description="Write `timeline.json`, a Chrome trace, to the run directory.")

    @property
    def overlapped(self) -> bool:
        """Whether training begins before its batch is complete, or generation before training has ended."""
        return self.pipelining or self.staleness > 0


class WarmupSection(Section):
    """Supervised warm-up on solved problems, before the loop."""

    steps: int = Field(0, ge=0, description="Optimizer steps; 0: no warm-up.")
    batch_size: int = Field(32, ge=1, description="Solved problems per step.")
    lr: float = Field(1e-3, gt=0, description="Learning rate (constant).")
    examples: int | None = Field(None, ge=1, description="Different problems; null: steps * batch_size.")
    examples_seed: int = Field(0, ge=0, description="Generator seed; example i has seed `examples_seed + i`.")
    answer_template: str = Field("{answer}", description="Text around each right answer; must hold `{answer}`.")
    learn: Literal["answers", "text"] = Field(
        "answers",
        description="answers: the prompt is given and the answer learnt; text: prompt and answer are learnt as running "
        "text, a language-model warm-up.",
    )
    stop_at_accuracy: float | None = Field(
        None, gt=0, le=1, description="Stop early at this greedy accuracy on the batches (mean of two); null: never."
    )


class CheckpointSection(Section):
    """Megatron distributed checkpoints of weights, optimizer, RNG and loop state."""

    every: int = Field(10, ge=0, description="Rollout iterations between checkpoints; 0: only at the end.")
    keep: int = Field(2, ge=1, description="Newest checkpoints kept.")
    save_optimizer: bool = Field(True, description="Save optimizer states; without them a run cannot be resumed.")


class LoggingSection(Section):
    """Where metrics go besides `metrics.jsonl`."""

    wandb: Literal["off", "auto", "offline", "online"] = Field(
        "auto", description="Weights & Biases; auto: online with WANDB_API_KEY, offline without."
    )
    wandb_project: str = Field("megatron-ultraep", description="Project name at Weights & Biases.")
    tensorboard: bool = Field(True, description="Write TensorBoard event files.")
    traces_every: int = Field(
        0, ge=0, description="Iterations between routing traces saved in `traces/` of the run directory; 0: none."
    )
    progress: bool = Field(True, description="Progress bar, or one line per step when not on a terminal.")

    @model_validator(mode="before")
    @classmethod
    def _yaml_off(cls, raw: Any) -> Any:
        """YAML reads a bare `off` as false; take it as it was meant."""
        if isinstance(raw, dict) and isinstance(raw.get("wandb"), bool):
            return {**raw, "wandb": "auto" if raw["wandb"] else "off"}
        return raw


class RaySection(Section):
    """The Ray instance."""

    address: str | None = Field(None, description="Cluster to join; null: a private local instance, ended with us.")
    num_cpus: int | None = Field(None, ge=1, description="CPUs of the private instance; null: as many as actors ask.")
    object_store_mib: int = Field(
        256, ge=80, description="MiB of the object store: of a private instance, or of each node of a Slurm job."
    )
    temp_dir: ConfigPath | None = Field(
        None, description="Where Ray's files go, in a fresh directory that is removed at the end; null: /tmp."
    )


class RunConfig(Section):
    """One run, whole."""

    run: RunSection = Field(description=RunSection.__doc__)
    model: ModelSection = Field(description=ModelSection.__doc__)
    data: DataSection = Field(description=DataSection.__doc__)
    reward: RewardSection = Field(description=RewardSection.__doc__)
    sampling: SamplingSection = Field(default_factory=SamplingSection, description=SamplingSection.__doc__)
    rollout: RolloutSection = Field(default_factory=RolloutSection, description=RolloutSection.__doc__)
    trainer: TrainerSection = Field(default_factory=TrainerSection, description=TrainerSection.__doc__)
    balance: BalanceSection = Field(default_factory=BalanceSection, description=BalanceSection.__doc__)
    stream: StreamSection = Field(default_factory=StreamSection, description=StreamSection.__doc__)
    fuse: FuseSection = Field(default_factory=FuseSection, description=FuseSection.__doc__)
    algorithm: AlgorithmSection = Field(default_factory=AlgorithmSection, description=AlgorithmSection.__doc__)
    critic: CriticSection | None = Field(None, description=CriticSection.__doc__)
    reference: ReferenceSection = Field(default_factory=ReferenceSection, description=ReferenceSection.__doc__)
    warmup: WarmupSection = Field(default_factory=WarmupSection, description=WarmupSection.__doc__)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description=EvaluationSection.__doc__)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection, description=CheckpointSection.__doc__)
    logging: LoggingSection = Field(default_factory=LoggingSection, description=LoggingSection.__doc__)
    profile: ProfileSection = Field(default_factory=ProfileSection, description=ProfileSection.__doc__)
    ray: RaySection = Field(default_factory=RaySection, description=RaySection.__doc__)
    plan: PlanSection = Field(default_factory=PlanSection, description=PlanSection.__doc__)
    allow_untested: bool = Field(False, description="Run with versions that were not tested; also --allow-untested.")
    allow_changes: bool = Field(
        False, description="Resume although fields that matter differ from the run's; also --allow-changes."
    )

    @property
    def output_dir(self) -> Path:
        """The run directory."""
        return self.run.output_dir or Path("runs") / self.run.name

    @property
    def engine_dtype(self) -> Literal["float32", "bfloat16"]:
        """Type of the engines' weights."""
        if self.rollout.dtype is not None:
            return self.rollout.dtype
        return "bfloat16" if self.model.dtype == "bfloat16" else "float32"

    @property
    def samples_per_step(self) -> int:
        """Samples of one rollout iteration."""
        return self.data.prompts_per_step * self.data.samples_per_prompt

    @property
    def longest_sample(self) -> int:
        """Tokens of the longest possible sample, prompt and response together."""
        return self.data.max_prompt_tokens + self.sampling.max_tokens

    @property
    def importance_cap(self) -> float | None:
        """Cap of the importance weights between rollout and training, None for no weights."""
        importance = self.algorithm.importance
        if importance.truncation != "auto":
            return importance.truncation
        stale = self.stream.staleness > 0 and self.algorithm.old_logprobs == "recompute"
        return 2.0 if stale and importance.band is None else None

    @property
    def transfer_path(self) -> Literal["store", "nccl", "gloo", "ipc"]:
        """How weights travel to engines."""
        stream = self.stream
        if stream.transfer != "auto":
            return stream.transfer
        if self.rollout.device != "cuda" or self.trainer.backend != "nccl" or stream.elastic.max_engines is not None:
            return "store"
        if stream.colocated:
            beside = self.trainer.ranks == self.rollout.engines and self.rollout.tensor_parallel == 1
            return "ipc" if beside else "store"
        return "store" if stream.staleness and stream.in_flight == "finish" else "nccl"

    @property
    def layouts(self) -> dict[str, ParallelSection]:
        """Sizes of every model on the trainer's ranks, by the dotted field that says them."""
        own = {
            "critic.parallel": self.critic and self.critic.parallel,
            "reference.parallel": self.reference.parallel,
            "reward.model.parallel": self.reward.model and self.reward.model.parallel,
        }
        return {"trainer.parallel": self.trainer.parallel} | {path: p for path, p in own.items() if p is not None}

    @property
    def keeps_reference(self) -> bool:
        """Whether a reference model is needed."""
        return self.algorithm.kl.coef > 0

    @property
    def infers(self) -> bool:
        """Whether there are passes over samples before training's own: old log-probs, reference, values, scores."""
        partners = self.keeps_reference or self.critic is not None or self.reward.model is not None
        return self.algorithm.old_logprobs == "recompute" or partners
