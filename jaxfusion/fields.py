"""Every field of a run's config, its default and its meaning, job by job.

Dataclasses alone; `config.py` makes them from files in `configs/` and the command line.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from jaxfusion.schema import (
    Above0,
    Axis,
    Count,
    Lengths,
    Number,
    Patterns,
    Probability,
    RowCount,
    Schema,
    Seed,
    Seeds,
    Share,
    Text,
    Weight,
    one_of,
)

FUSIONS = ("last", "layer", "global_softmax", "transformer_softmax")
BACKWARDS = ("stack", "second_pass")
ALIGNERS = ("none", "linear", "mlp")
PROJECTORS = ("linear", "ffn", "mapping", "resampler")
SCHEDULES = ("cosine", "constant")
DTYPES = ("float32", "bfloat16")
TOWER_DTYPES = (*DTYPES, "int8", "int4")
ATTENTIONS = ("auto", "plain", "cudnn", "pallas")
REMATS = ("none", "dots", "full")
ROLES = ("encoder", "decoder")
METHODS = ("lens", "supervised", "steering", "disentangle", "none")
RECIPES = ("default", "paper_code")
PLACES = ("memory", "disk")
# Fields of `EvalConfig` that decide what an answer is.
DECODING = ("max_new_tokens", "temperature", "top_p", "seed", "stop")
TRACKERS = ("tensorboard", "wandb", "mlflow")
OBJECTIVES = ("causal_lm", "masked_lm", "code_switch")

Dtype = Annotated[str, one_of("dtype", TOWER_DTYPES)]
Remat = Annotated[str, one_of("remat", REMATS)]
Attention = Annotated[str, one_of("attention", ATTENTIONS)]
Backward = Annotated[str, one_of("fusion.backward", BACKWARDS)]
FusionName = Annotated[str, one_of("fusion", FUSIONS)]
AlignerName = Annotated[str, one_of("aligner", ALIGNERS)]
AlignerRecipe = Annotated[str, one_of("aligner.recipe", RECIPES)]
ProjectorName = Annotated[str, one_of("projector", PROJECTORS)]
Schedule = Annotated[str, one_of("schedule", SCHEDULES)]
Method = Annotated[str, one_of("lens.method", METHODS)]
Recipe = Annotated[str, one_of("lens.recipe", RECIPES)]
Place = Annotated[str, one_of("lens.keep", PLACES)]
Objective = Annotated[str, one_of("objective", OBJECTIVES)]
Tracker = Annotated[str, one_of("tracker", TRACKERS)]
Role = Annotated[str, one_of("role", ROLES)]
Languages = Annotated[tuple[Text, ...], Field(min_length=1)]


@dataclass(frozen=True)
class EncoderSettings(Schema):
    """The multilingual encoder."""

    checkpoint: Text = "google/mt5-large"  # a directory, or a hub id
    revision: Text | None = None  # of a hub id; kept as a commit in the workdir once resolved
    # Of the frozen weights and activations: float32, bfloat16, or int8 and int4, which hold the
    # weights in 8 or 4 bits and compute in bfloat16.
    dtype: Dtype = "float32"
    remat: Remat = "none"  # what the backward pass recomputes: none, dots (keep products), full
    attention: Attention = "auto"  # plain, cudnn (GPU), pallas (TPU); auto: what the device has
    dropout: Share = 0.0  # 0.1 is what the papers' runs had by accident of `model.train()`
    added_tokens: tuple[Text, ...] = ()  # LangBridge adds whitespace tokens to the tokenizer
    prefix: str = ""  # in front of every text that it reads; E5 wants "query: "
    # GiB of its states that may be kept on disk for each set of layers that a fusion reads, so that
    # each text is read once, not in every epoch and by every variant of a comparison. For a frozen
    # encoder without dropout, in one process.
    keep_states: Weight = 0.0


@dataclass(frozen=True)
class DecoderSettings(Schema):
    """The English-centric LLM."""

    checkpoint: Text = "meta-llama/Llama-3.2-1B-Instruct"
    revision: Text | None = None
    dtype: Dtype = "float32"
    remat: Remat = "none"
    attention: Attention = "auto"


@dataclass(frozen=True)
class FusionConfig(Schema):
    """How the encoder's layers become one feature per token."""

    name: FusionName = "transformer_softmax"  # last, layer, global_softmax, transformer_softmax
    layer: Count = 1  # of `layer`: 1 … L, as Hugging Face numbers states
    dropout: Share = 0.1  # of `transformer_softmax`
    d_ff: Count = 2048  # of `transformer_softmax`
    noise: Weight = 0.0  # Gaussian, on the features in training, relative to their rms
    # Of `global_softmax`: stack (keep states), second_pass (compute them again).
    backward: Backward = "stack"


@dataclass(frozen=True)
class ProjectorConfig(Schema):
    """From the encoder's width to the decoder's."""

    name: ProjectorName = "linear"  # linear, ffn, resampler (LangBridge), mapping (MindMerger)
    d_ff: Count | None = None  # hidden width of ffn and mapping; none: twice the encoder's
    latents: Count = 64  # slots of resampler
    dropout: Share = 0.1  # of resampler
    end_std: Weight = 0.0  # the end vector's start: 0 (2508.09091) or N(0, 1) (LangBridge)
    # Start with a regression from the encoder's features of the training texts to the LLM's own
    # embeddings of them, instead of at random. Not in the papers.
    warm_start: bool = False


@dataclass(frozen=True)
class AlignerConfig(Schema):
    """LayAlign: every LLM layer reads all encoder states, through a gate that starts at 0."""

    name: AlignerName = "none"  # none, linear, mlp
    # paper_code: as the authors' code, h_0 … h_{L-1} in place of h_1 … h_L, and padding is read.
    recipe: AlignerRecipe = "default"


@dataclass(frozen=True)
class TaskConfig(Schema):
    """A task of the user's own; see docs/data.md."""

    prompt: str = ""  # the encoder's text; {column} names a column of the rows
    labels: tuple[Text, ...] = ()  # what the LLM answers, by class; empty: the text in `target`
    languages: tuple[Text, ...] = ("en",)
    source: Text | None = None  # as data.path, without directories; none: data.path must say
    # Of parallel text files, one line a row: where the answers are, with {language} and {split} or
    # without. The prompt is '{text}', a line of `source`.
    answers: Text | None = None
    subset: Text | None = None  # configuration of a hub or tfds dataset; {language} is filled in
    revision: Text | None = None  # of a hub dataset
    # What {split} is, or the dataset calls it; `all[0:900]` is rows 0 to 899 of `all`.
    splits: dict[str, Text] = field(default_factory=dict)
    columns: dict[str, Text] = field(default_factory=dict)  # of the rows, named otherwise there
    names: dict[str, Text] = field(default_factory=dict)  # of languages, named otherwise there
    spellings: tuple[str, ...] = ()  # of the labels in the rows, if neither as here nor 0, 1, …
    extract: Text | None = None  # of a free text what is compared: last_number; none: all of it
    unlabelled: bool = False  # plain text: the encoder reads its beginning, the LLM learns the rest
    parallel: bool = False  # test rows of the same number are translations of each other


@dataclass(frozen=True)
class DataConfig(Schema):
    """Training data."""

    task: Text = "xnli"
    # Where the rows are: a directory with the task's files; a file or pattern with {language} and
    # {split}; hub:ID; tfds:NAME. None: where the task says.
    path: Text | None = None
    revision: Text | None = None  # of a hub dataset; kept as a commit in the workdir once resolved
    streaming: bool = False  # take the first train_rows rows (balanced: of every class), no more
    # Of training, and of development unless data.dev_languages is set; 'all': of the task.
    language: Text = "en"
    # What follows the prefix, in the LLM's own tokens: nothing, a fixed instruction, or '{query}'
    # (the whole encoder prompt again: MindMerger's augmentation).
    text_prompt: str = ""
    chat_template: bool = False  # the LLM's own: prefix and text prompt are the user's words
    max_encoder_tokens: Count = 200  # longer examples are cut, counted and reported
    max_decoder_tokens: Count = 200  # of text prompt, and of target with its EOS
    # Of query and target together: the target may use whatever the query leaves, as in
    # LangBridge. None: max_decoder_tokens limits the target.
    max_total_tokens: Count | None = None
    # Begin every row of the LLM with BOS. None: where its tokenizer does; a run keeps which it was.
    bos: bool | None = None
    target_eos: bool = True  # put the LLM's end token behind every target (LangBridge puts none)
    buckets: Lengths = (32, 64, 96, 128, 160, 200)  # encoder lengths that get compiled
    pack: bool = False  # several short examples in a row, told apart by masks and positions
    train_rows: Count | None = None  # a seeded subset of the training rows
    balanced: bool = False  # draw that subset with the same number from every class
    # Of development, which is scored during training: rows of each language at most, the first
    # ones; languages, where they are others than `language`; which of them decides what the best
    # checkpoint is (or 'mean', of all of them); and how many scores in a row may be no better
    # before training ends (none: it goes on to its last step).
    dev_rows: Count | None = None
    dev_languages: tuple[Text, ...] = ()
    dev_decides: Text = "mean"
    dev_patience: Count | None = None


@dataclass(frozen=True)
class GroupConfig(Schema):
    """Parameters that train, by pattern of their path, and how fast."""

    patterns: Patterns = ("(fusion|projector|aligner)/.*",)
    learning_rate: Weight = 3e-5
    weight_decay: Weight = 3e-7


Groups = Annotated[dict[str, GroupConfig], Field(min_length=1)]  # without one nothing trains


@dataclass(frozen=True)
class OptimizerConfig(Schema):
    """AdamW. What matches no group's pattern is frozen."""

    groups: Groups = field(default_factory=lambda: {"bridge": GroupConfig()})
    b1: Share = 0.8
    b2: Share = 0.999
    eps: Above0 = 1e-8
    clip_norm: Above0 = 1.0
    schedule: Schedule = "cosine"  # cosine (to 0) or constant, after the warm-up
    warmup_fraction: Share = 0.05  # of all steps


@dataclass(frozen=True)
class TrainConfig(Schema):
    """How long, and what is written when."""

    batch_size: Count = 8  # examples of a step, packed or not
    accumulate: Count = 1  # parts in which a step's batch is computed, one after the other
    epochs: Count = 3
    steps: Count | None = None  # in place of epochs
    seed: Seed = 0
    init_from: Text | None = None  # workdir whose trained part this run starts with
    log_every: Count = 10
    eval_every: Count = 1000  # steps between scores on the development split
    checkpoint_every: Count = 1000


@dataclass(frozen=True)
class EvalConfig(Schema):
    """What is scored after training, and during it on the development split."""

    tasks: tuple[Text, ...] = ()  # empty: the training task
    languages: tuple[Text, ...] = ()  # empty: all languages of each task
    batch_size: Count = 32
    max_encoder_tokens: Count = 512
    max_decoder_tokens: Count = 512
    # Of an answer; none: what the task wants, mostly 16. 0: no answers, only likelihoods of labels.
    max_new_tokens: RowCount | None = None
    temperature: Weight = 0.0  # of drawing an answer's tokens; 0 takes the likeliest
    # Sample among the likeliest tokens with this total probability (nucleus).
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Seed = 0  # of what is drawn
    stop: tuple[Text, ...] = ()  # texts that end an answer; empty: those of the task, if any
    drop_seen: bool = False  # leave out test rows that were trained on, instead of refusing them


@dataclass(frozen=True)
class LoggingConfig(Schema):
    """Where metrics go, besides the workdir's metrics.jsonl."""

    to: tuple[Tracker, ...] = ("tensorboard",)  # and wandb, mlflow: by their own variables


@dataclass(frozen=True)
class MeshConfig(Schema):
    """Device counts along the mesh axes; one of them may be -1 and is filled in."""

    data: Axis = -1
    fsdp: Axis = 1
    tensor: Axis = 1


@dataclass(frozen=True)
class Config(Schema):
    """A bridge between two checkpoints."""

    job: str = "bridge"
    encoder: EncoderSettings = EncoderSettings()
    decoder: DecoderSettings = DecoderSettings()
    fusion: FusionConfig = FusionConfig()
    projector: ProjectorConfig = ProjectorConfig()
    aligner: AlignerConfig = AlignerConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()
    logging: LoggingConfig = LoggingConfig()
    # Train it once for each of these in place of train.seed: a comparison of one variant.
    seeds: Seeds = ()
    # Fields of a stage before this one, which differ from this config's: it is trained first, in
    # WORKDIR/first, and this run starts with what it learned.
    first: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, TaskConfig] = field(default_factory=dict)  # your own, by name


@dataclass(frozen=True)
class TowerConfig(Schema):
    """The shape of a tower that is trained from nothing, and the size of its tokenizer."""

    role: Role = "encoder"  # encoder (mT5) or decoder (Llama)
    d_model: Count = 128
    d_ff: Count = 256
    num_layers: Count = 6
    num_heads: Count = 4
    head_dim: Count = 32
    vocab_size: Count = 4096  # at most; a tokenizer of that size is trained on the same text


@dataclass(frozen=True)
class CorpusConfig(Schema):
    """What is read: a directory's text-LANGUAGE.txt, pairs-LANGUAGE.tsv, solved-LANGUAGE.tsv."""

    path: Text = "made:pocket"
    languages: tuple[Text, ...] = ()  # empty: all of the directory
    pivot: Text = "en"  # the language of the pairs' first column
    translations: bool = False  # a decoder reads pairs too, as "SENTENCE = TRANSLATION"
    max_tokens: Count = 64  # longer texts are cut, counted and reported
    buckets: Lengths = (16, 24, 32, 40, 48, 64)  # lengths that get compiled
    sampling: Probability = 0.5  # a language with n texts is drawn in proportion to n**sampling
    dev_rows: Count = 512  # texts held out of all


@dataclass(frozen=True)
class ObjectiveConfig(Schema):
    """What is predicted."""

    name: Objective = "code_switch"  # causal_lm, masked_lm, code_switch
    masked: Probability = 0.2  # of words: hidden, for the encoder to restore
    switched_texts: Probability = 0.7  # of texts: some words translated (code_switch)
    switched_words: Probability = 0.4  # of the words of such a text
    unchanged_weight: Weight = 0.1  # of words that were left as they are
    answer_weight: Weight = 4.0  # of an answer's tokens against its text's (causal_lm)
    # On a decoder's embeddings in training, of each token and of each text, relative to their rms.
    noise: Weight = 0.0


@dataclass(frozen=True)
class PretrainConfig(Schema):
    """A tower trained from nothing, for miniatures of a bridge."""

    job: str = "pretrain"
    tower: TowerConfig = TowerConfig()
    data: CorpusConfig = CorpusConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    logging: LoggingConfig = LoggingConfig()


@dataclass(frozen=True)
class CompareConfig(Schema):
    """Bridges that differ in a few fields, trained and scored side by side."""

    job: str = "compare"
    base: Config = Config()
    # Each with its name and the fields that differ, as {"name": "A", "fusion": {"name": "last"}};
    # the others are compared with the first.
    variants: tuple[dict[str, Any], ...] = ()
    groups: dict[str, Languages] = field(default_factory=dict)  # of languages, for means
    development: tuple[Text, ...] = ()  # languages on which the recipe was chosen: marked, no mean
    rows: Count | None = None  # test rows of each language
    seeds: Seeds = ()  # each variant is trained once for each; empty: for its train.seed


@dataclass(frozen=True)
class ParallelConfig(Schema):
    """Prompts that mean the same in several languages."""

    # A .jsonl, .json, .csv, .tsv or .parquet file or a hub dataset's id, with a column per
    # language; or text files by a pattern with {language}, the same line in each.
    path: str = ""  # must be given
    central: Text = "en"
    targets: tuple[Text, ...] = ()
    columns: dict[str, Text] = field(default_factory=dict)  # of languages that are named otherwise
    answer: Text | None = None  # column of answers, for supervised tuning
    probe_rows: Count | None = None  # rows that are probed, the first ones; none: all
    bos: bool | None = None  # begin every prompt with BOS; none: where the tokenizer does
    probe_path: Text | None = None  # prompts to probe, where not those of path; written alike
    rows: Count = 200  # rows that are trained on, the first ones
    chat_template: bool = True  # the LLM's own, in probing and training
    max_tokens: Count = 128  # longer prompts lose their beginning, counted and reported
    buckets: Lengths = (32, 64, 128)  # lengths that get compiled
    probe: Text | None = None  # probe.safetensors of an earlier run, in place of probing
    # Prompts after those that were probed and trained on: how many for perplexity, and how many to
    # answer, to see in which language (needs the extra `identify`).
    perplexity_rows: RowCount = 0
    reply_rows: RowCount = 0
    codes: dict[str, Text] = field(default_factory=dict)  # ISO 639-1, of languages named otherwise
    # Directory of the files of eval.tasks, {task} filled in; none: the hub.
    task_path: Text | None = None
    task_split: Text = "test"
    task_rows: Count | None = None  # first rows of each language


@dataclass(frozen=True)
class LensConfig(Schema):
    """What is done with the language subspaces (arXiv:2410.04407)."""

    method: Method = "lens"  # lens, supervised (both train), steering, disentangle, none
    recipe: Recipe = "default"  # or paper_code: prompts and probe as in the authors' code
    rank: Count | None = None  # of the language-specific subspace; none: all languages but one
    blocks: Count = 2  # trained blocks, counted from the top
    loss_layers: tuple[Count, ...] = ()  # behind which the losses act; empty: the last
    align: Weight = 1.0  # weights of the three losses; any may be 0
    separate: Weight = 1.0
    retain: Weight = 1.0
    weights: dict[str, Number] = field(default_factory=dict)  # w_k of languages; 1 unless given
    layers: tuple[Count, ...] = ()  # that steering and disentangling edit; empty: the middle third
    strength: Number = 1.0  # of steering and disentangling
    keep: Place = "memory"  # where activations are kept: memory, or disk (mapped, in the workdir)


@dataclass(frozen=True)
class LensRunConfig(Schema):
    """An LLM whose languages are probed and moved, with its baselines."""

    job: str = "lens"
    decoder: DecoderSettings = DecoderSettings()
    bridge: Text | None = None  # workdir of a bridge: its LLM, reading through it
    data: ParallelConfig = ParallelConfig()
    lens: LensConfig = LensConfig()
    optimizer: OptimizerConfig = OptimizerConfig(
        groups={"blocks": GroupConfig(("decoder/blocks/.*(kernel|bias)",), 1e-5, 0.1),
                "norms": GroupConfig(("decoder/blocks/.*scale",), 1e-5, 0.0)}, b1=0.9)
    train: TrainConfig = TrainConfig(epochs=1, log_every=5)
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()
    logging: LoggingConfig = LoggingConfig()
    tasks: dict[str, TaskConfig] = field(default_factory=dict)  # your own, by name
    # Runs from one cache, each with its name and the fields of `lens` and others that differ.
    sweep: tuple[dict[str, Any], ...] = ()


JOBS: dict[str, type] = {
    "bridge": Config, "pretrain": PretrainConfig, "compare": CompareConfig, "lens": LensRunConfig
}
Job = Config | PretrainConfig | CompareConfig | LensRunConfig
