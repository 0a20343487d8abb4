"""Every field of a run's config, its default and its meaning, job by job.

Dataclasses alone; `config.py` makes them from files in `configs/` and the command line.
"""

from dataclasses import dataclass, field
from typing import Any

FUSIONS = ("last", "layer", "global_softmax", "transformer_softmax")
BACKWARDS = ("stack", "second_pass")
PROJECTORS = ("linear", "ffn", "mapping", "resampler")
SCHEDULES = ("cosine", "constant")
DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("auto", "plain", "cudnn", "pallas")
REMATS = ("none", "dots", "full")
ROLES = ("encoder", "decoder")
METHODS = ("lens", "supervised", "steering", "disentangle", "none")
RECIPES = ("default", "paper_code")
PLACES = ("memory", "disk")
# Fields of `EvalConfig` that decide what an answer is.
DECODING = ("max_new_tokens", "temperature", "top_p", "seed", "stop")
OBJECTIVES = ("causal_lm", "masked_lm", "code_switch")


@dataclass(frozen=True)
class EncoderConfig:
    """The multilingual encoder."""

    checkpoint: str = "google/mt5-large"  # a directory, or a hub id
    revision: str | None = None  # of a hub id; kept as a commit in the workdir once resolved
    dtype: str = "float32"  # of the frozen weights and activations: float32 or bfloat16
    remat: str = "none"  # what the backward pass recomputes: none, dots (keep products), full
    attention: str = "auto"  # plain, cudnn (GPU), pallas (TPU); auto: what the device has
    dropout: float = 0.0  # 0.1 is what the papers' runs had by accident of `model.train()`
    added_tokens: tuple[str, ...] = ()  # LangBridge adds whitespace tokens to the tokenizer


@dataclass(frozen=True)
class DecoderConfig:
    """The English-centric LLM."""

    checkpoint: str = "meta-llama/Llama-3.2-1B-Instruct"
    revision: str | None = None
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"


@dataclass(frozen=True)
class FusionConfig:
    """How the encoder's layers become one feature per token."""

    name: str = "transformer_softmax"  # last, layer, global_softmax, transformer_softmax
    layer: int = 1  # of `layer`: 1 … L, as Hugging Face numbers states
    dropout: float = 0.1  # of `transformer_softmax`
    d_ff: int = 2048  # of `transformer_softmax`
    noise: float = 0.0  # Gaussian, on the features in training, relative to their rms
    backward: str = "stack"  # of `global_softmax`: stack (keep states), second_pass (recompute)


@dataclass(frozen=True)
class ProjectorConfig:
    """From the encoder's width to the decoder's."""

    name: str = "linear"  # linear, ffn, resampler (LangBridge), mapping (MindMerger)
    d_ff: int | None = None  # hidden width of ffn and mapping; none: twice the encoder's
    latents: int = 64  # slots of resampler
    dropout: float = 0.1  # of resampler
    end_std: float = 0.0  # the end vector's start: 0 (2508.09091) or N(0, 1) (LangBridge)
    # Start with a regression from the encoder's features of the training texts to the LLM's own
    # embeddings of them, instead of at random. Not in the papers.
    warm_start: bool = False


@dataclass(frozen=True)
class TaskConfig:
    """A task of the user's own; see docs/data.md."""

    prompt: str = ""  # the encoder's text; {column} names a column of the rows
    labels: tuple[str, ...] = ()  # what the LLM answers, by class; empty: the text in `target`
    languages: tuple[str, ...] = ("en",)
    source: str | None = None  # as data.path, without directories; none: data.path must say
    subset: str | None = None  # configuration of a hub or tfds dataset; {language} is filled in
    revision: str | None = None  # of a hub dataset
    # What {split} is, or the dataset calls it; `all[0:900]` is rows 0 to 899 of `all`.
    splits: dict[str, str] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)  # of the rows, named otherwise there
    names: dict[str, str] = field(default_factory=dict)  # of languages, named otherwise there
    spellings: tuple[str, ...] = ()  # of the labels in the rows, if neither as here nor 0, 1, …
    extract: str | None = None  # of a free text what is compared: last_number; none: all of it
    unlabelled: bool = False  # plain text: the encoder reads its beginning, the LLM learns the rest
    parallel: bool = False  # test rows of the same number are translations of each other


@dataclass(frozen=True)
class DataConfig:
    """What is learned from."""

    task: str = "xnli"
    # Where the rows are: a directory with the task's files; a file or pattern with {language} and
    # {split}; hub:ID; tfds:NAME. None: where the task says.
    path: str | None = None
    revision: str | None = None  # of a hub dataset; kept as a commit in the workdir once resolved
    streaming: bool = False  # take the first train_rows rows (balanced: of every class), no more
    language: str = "en"  # of training and development
    # What follows the prefix, in the LLM's own tokens: nothing, a fixed instruction, or '{query}'
    # (the whole encoder prompt again: MindMerger's augmentation).
    text_prompt: str = ""
    chat_template: bool = False  # the LLM's own: prefix and text prompt are the user's words
    max_encoder_tokens: int = 200  # longer examples are cut, counted and reported
    max_decoder_tokens: int = 200  # of text prompt, and of target with its EOS
    # Of query and target together: a target may then be so long as its query leaves room, as
    # LangBridge cuts them. None: max_decoder_tokens is a target's limit.
    max_total_tokens: int | None = None
    target_eos: bool = True  # put the LLM's end token behind every target (LangBridge puts none)
    buckets: tuple[int, ...] = (32, 64, 96, 128, 160, 200)  # encoder lengths that get compiled
    pack: bool = False  # several short examples in a row, told apart by masks and positions
    train_rows: int | None = None  # a seeded subset of the training rows
    balanced: bool = False  # draw that subset with the same number from every class
    dev_rows: int | None = None  # the first so many development rows


@dataclass(frozen=True)
class GroupConfig:
    """Parameters that train, by pattern of their path, and how fast."""

    patterns: tuple[str, ...] = ("(fusion|projector)/.*",)
    learning_rate: float = 3e-5
    weight_decay: float = 3e-7


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. What matches no group's pattern is frozen."""

    groups: dict[str, GroupConfig] = field(default_factory=lambda: {"bridge": GroupConfig()})
    b1: float = 0.8
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0
    schedule: str = "cosine"  # cosine (to 0) or constant, after the warm-up
    warmup_fraction: float = 0.05  # of all steps


@dataclass(frozen=True)
class TrainConfig:
    """How long, and what is written when."""

    batch_size: int = 8  # examples of a step, packed or not
    accumulate: int = 1  # parts in which a step's batch is computed, one after the other
    epochs: int = 3
    steps: int | None = None  # in place of epochs
    seed: int = 0
    init_from: str | None = None  # workdir whose trained part this run starts with
    log_every: int = 10
    eval_every: int = 1000  # steps between scores on the development split
    checkpoint_every: int = 1000


@dataclass(frozen=True)
class EvalConfig:
    """What is scored after training, and during it on the development split."""

    tasks: tuple[str, ...] = ()  # empty: the training task
    languages: tuple[str, ...] = ()  # empty: all languages of each task
    batch_size: int = 32
    max_encoder_tokens: int = 512
    max_decoder_tokens: int = 512
    max_new_tokens: int | None = None  # of an answer; none: what the task wants, mostly 16
    temperature: float = 0.0  # of drawing an answer's tokens; 0 takes the likeliest
    top_p: float = 1.0  # drawn among the likeliest tokens of so much probability together
    seed: int = 0  # of what is drawn
    stop: tuple[str, ...] = ()  # texts that end an answer; empty: those of the task, if any
    drop_seen: bool = False  # leave out test rows that were trained on, instead of refusing them


@dataclass(frozen=True)
class MeshConfig:
    """Device counts along the mesh axes; one of them may be -1 and is filled in."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class Config:
    """A bridge between two checkpoints."""

    job: str = "bridge"
    encoder: EncoderConfig = EncoderConfig()
    decoder: DecoderConfig = DecoderConfig()
    fusion: FusionConfig = FusionConfig()
    projector: ProjectorConfig = ProjectorConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()
    # Train it once for each of these in place of train.seed: a comparison of one variant.
    seeds: tuple[int, ...] = ()
    tasks: dict[str, TaskConfig] = field(default_factory=dict)  # of one's own, by name


@dataclass(frozen=True)
class TowerConfig:
    """The shape of a tower that is trained from nothing, and the size of its tokenizer."""

    role: str = "encoder"  # encoder (mT5) or decoder (Llama)
    d_model: int = 128
    d_ff: int = 256
    num_layers: int = 6
    num_heads: int = 4
    head_dim: int = 32
    vocab_size: int = 4096  # at most; a tokenizer of that size is trained on the same text


@dataclass(frozen=True)
class CorpusConfig:
    """What is read: a directory's text-LANGUAGE.txt, pairs-LANGUAGE.tsv, solved-LANGUAGE.tsv."""

    path: str = "made:pocket"
    languages: tuple[str, ...] = ()  # empty: all of the directory
    pivot: str = "en"  # the language of the pairs' first column
    translations: bool = False  # a decoder reads pairs too, as "SENTENCE = TRANSLATION"
    max_tokens: int = 64  # longer texts are cut, counted and reported
    buckets: tuple[int, ...] = (16, 24, 32, 40, 48, 64)  # lengths that get compiled
    sampling: float = 0.5  # a language with n texts is drawn in proportion to n**sampling
    dev_rows: int = 512  # texts held out of all


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is predicted."""

    name: str = "code_switch"  # causal_lm, masked_lm, code_switch
    masked: float = 0.2  # of words: hidden, for the encoder to restore
    switched_texts: float = 0.7  # of texts: some words replaced by a translation (code_switch)
    switched_words: float = 0.4  # of the words of such a text
    unchanged_weight: float = 0.1  # of words that were left as they are
    answer_weight: float = 4.0  # of an answer's tokens against its text's (causal_lm)
    # On a decoder's embeddings in training, of each token and of each text, relative to their rms.
    noise: float = 0.0


@dataclass(frozen=True)
class PretrainConfig:
    """A tower trained from nothing, for miniatures of a bridge."""

    job: str = "pretrain"
    tower: TowerConfig = TowerConfig()
    data: CorpusConfig = CorpusConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()


@dataclass(frozen=True)
class CompareConfig:
    """Bridges that differ in a few fields, trained and scored side by side."""

    job: str = "compare"
    base: Config = Config()
    # Each with its name and the fields that differ, as {"name": "A", "fusion": {"name": "last"}};
    # the others are compared with the first.
    variants: tuple[dict[str, Any], ...] = ()
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of languages, for means
    development: tuple[str, ...] = ()  # languages on which the recipe was chosen: marked, no mean
    rows: int | None = None  # test rows of each language
    seeds: tuple[int, ...] = ()  # each variant is trained once for each; empty: for its train.seed


@dataclass(frozen=True)
class ParallelConfig:
    """Prompts that mean the same in several languages."""

    # A .jsonl, .json, .csv, .tsv or .parquet file or a hub dataset's id, with a column per
    # language; or text files by a pattern with {language}, the same line in each.
    path: str = ""
    central: str = "en"
    targets: tuple[str, ...] = ()
    columns: dict[str, str] = field(default_factory=dict)  # of languages that are named otherwise
    answer: str | None = None  # column of answers, for supervised tuning
    probe_rows: int | None = None  # the first so many rows are probed; none: all
    probe_path: str | None = None  # prompts to probe, where not those of path; written alike
    rows: int = 200  # the first so many are trained on
    chat_template: bool = True  # the LLM's own, in probing and training
    max_tokens: int = 128  # longer prompts lose their beginning, counted and reported
    buckets: tuple[int, ...] = (32, 64, 128)  # lengths that get compiled
    probe: str | None = None  # probe.safetensors of an earlier run, in place of probing
    # Prompts behind those that were probed and trained on: of so many the perplexity is measured,
    # so many are answered, to see in which language (needs the extra `identify`).
    perplexity_rows: int = 0
    reply_rows: int = 0
    codes: dict[str, str] = field(default_factory=dict)  # ISO 639-1, of languages named otherwise
    # Directory of the files of eval.tasks, {task} filled in; none: the hub.
    task_path: str | None = None
    task_split: str = "test"
    task_rows: int | None = None  # the first so many of each language


@dataclass(frozen=True)
class LensConfig:
    """What is done with the language subspaces (arXiv:2410.04407)."""

    method: str = "lens"  # lens, supervised (both train), steering, disentangle, none
    recipe: str = "default"  # or paper_code: prompts and probe as in the authors' code
    rank: int | None = None  # of the language-specific subspace; none: all languages but one
    blocks: int = 2  # so many at the top train
    loss_layers: tuple[int, ...] = ()  # behind which the losses act; empty: the last
    align: float = 1.0  # weights of the three losses; any may be 0
    separate: float = 1.0
    retain: float = 1.0
    weights: dict[str, float] = field(default_factory=dict)  # w_k of languages; 1 unless given
    layers: tuple[int, ...] = ()  # that steering and disentangling edit; empty: the middle third
    strength: float = 1.0  # of steering and disentangling
    keep: str = "memory"  # where activations are kept: memory, or disk (mapped, in the workdir)


@dataclass(frozen=True)
class LensRunConfig:
    """An LLM whose languages are probed and moved, with its baselines."""

    job: str = "lens"
    decoder: DecoderConfig = DecoderConfig()
    bridge: str | None = None  # workdir of a bridge: its LLM, reading through it
    data: ParallelConfig = ParallelConfig()
    lens: LensConfig = LensConfig()
    optimizer: OptimizerConfig = OptimizerConfig(
        groups={"blocks": GroupConfig(("decoder/blocks/.*(kernel|bias)",), 1e-5, 0.1),
                "norms": GroupConfig(("decoder/blocks/.*scale",), 1e-5, 0.0)}, b1=0.9)
    train: TrainConfig = TrainConfig(epochs=1, log_every=5)
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()
    tasks: dict[str, TaskConfig] = field(default_factory=dict)  # of one's own, by name
    # Runs from one cache, each with its name and the fields of `lens` and others that differ.
    sweep: tuple[dict[str, Any], ...] = ()


JOBS: dict[str, type] = {
    "bridge": Config, "pretrain": PretrainConfig, "compare": CompareConfig, "lens": LensRunConfig
}
Job = Config | PretrainConfig | CompareConfig | LensRunConfig
