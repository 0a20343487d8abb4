"""A bridge exported by jaxfusion, in PyTorch: multilingual encoder → fusion → projector → LLM.

    model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(DIR, trust_remote_code=True)
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True)

Needs torch, transformers (4 or 5), safetensors and `tokenization_jaxfusion.py`, which defines the
ids. Methods: LangBridge (arXiv:2401.10695), Global and Transformer Softmax (arXiv:2508.09091),
LayAlign (arXiv:2502.11405).
"""

import copy
import inspect
import json
import logging
import os
import shutil
import sys
from contextlib import contextmanager
from importlib import import_module

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import cached_file

from .tokenization_jaxfusion import BridgeTokenizer, write_tokenizer

WEIGHTS = "model.safetensors"
CODE = ("modeling_jaxfusion.py", "tokenization_jaxfusion.py")
AUTO_MAP = {"AutoConfig": "modeling_jaxfusion.BridgeConfig",
            "AutoModelForCausalLM": "modeling_jaxfusion.BridgeForCausalLM"}
# transformers' class of each family; ModernBert's is there from 4.48 on.
ENCODERS = {"mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel", "bert": "BertModel",
            "xlm-roberta": "XLMRobertaModel", "modernbert": "ModernBertModel",
            "m2m_100": "M2M100Model"}
ROLES = {"encoder": "reader", "decoder": "writer"}
OWN = ("fusion.", "projector.", "aligner.")
IGNORED = -100  # the label of a token that is not predicted
# The argument of from_pretrained, renamed in 4.56.
OLD = tuple(int(x) for x in transformers.__version__.split(".")[:2]) < (4, 56)
DTYPE = "torch_dtype" if OLD else "dtype"
logger = logging.getLogger(__name__)


class BridgeConfig(PretrainedConfig):
    """The four parts of a bridge.

    Args:
      reader, writer: of encoder and LLM: `checkpoint` (a hub id, or a folder inside this one if
        `inside` is true), `revision`, `width`, `dtype`; of the reader also `layers`, `family` and
        `alone`: whether its files have no decoder; of the writer `capped`: whether its attention
        scores have a soft cap.
      fusion: `name`, `layer` and `d_ff`.
      projector: `name`, `d_ff` and `latents`.
      aligner: `name`; `layers` of the LLM; `padding`: whether it reads as LayAlign's authors do.
      start_ids: at the start of every row of the LLM: BOS, or the header of a chat.
      after_ids: after the prefix; None if every query has its own prompt.
      query_offset, prompt_offset: the first ids of queries and of their prompts.
      query_end_id: the last id of every query; None if the encoder has none.
      query_pad_id: the padding id.
      unfrozen: names of the parameters of encoder and LLM that train.
    """

    model_type = "jaxfusion_bridge"

    def __init__(self, reader=None, writer=None, fusion=None, projector=None, start_ids=(),
                 after_ids=(), query_offset=0, prompt_offset=0, query_end_id=None,
                 query_pad_id=None, vocab_size=0, unfrozen=(), aligner=None, **kwargs):
        self.reader, self.writer = reader or {}, writer or {}
        self.fusion, self.projector = fusion or {}, projector or {}
        self.aligner = aligner or {"name": "none"}
        self.start_ids = list(start_ids)
        self.after_ids = after_ids if after_ids is None else list(after_ids)
        self.query_offset, self.prompt_offset = query_offset, prompt_offset
        self.query_end_id, self.query_pad_id = query_end_id, query_pad_id
        self.unfrozen = list(unfrozen)
        super().__init__(**kwargs)
        # Set last: transformers 5 checks above that ids are below it, and those of queries are not.
        self.vocab_size = vocab_size


class Float32(nn.Module):
    """A module that stays float32 when the model is cast: it is small, with large scales."""

    def _apply(self, fn, *args, **kwargs):
        def cast(x):
            moved = fn(x)
            return x.to(moved.device) if moved.is_floating_point() else moved

        return super()._apply(cast, *args, **kwargs)


class Last(Float32):
    """The last layer (LangBridge)."""

    def forward(self, states, mask):
        return states[-1]


class Layer(Float32):
    """One fixed layer, counted from 1."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, states, mask):
        return states[self.layer - 1]


class GlobalSoftmax(Float32):
    """One weight per layer: softmax((100 + 1e5·t)·w)."""

    def __init__(self, layers):
        super().__init__()
        self.w, self.t = nn.Parameter(torch.zeros(layers)), nn.Parameter(torch.zeros(()))

    def forward(self, states, mask):
        weights = torch.softmax((100.0 + 1e5 * self.t) * self.w, dim=0)
        return torch.einsum("l,lbsd->bsd", weights, states)


class TransformerSoftmax(Float32):
    """Weights for every token, from one post-norm transformer layer over `[cls, h_1+p_1, …]`.

    Only the cls row is used, and its query is the same for every token, so the layer reduces to
    one score per state and one mean.
    """

    def __init__(self, layers, width, d_ff):
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros(layers, width))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.attn_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, d_ff), nn.Linear(d_ff, width)
        self.weigh = nn.Linear(width, layers)

    def forward(self, states, mask):
        query = self.q(self.cls) / self.cls.numel() ** 0.5
        u = query @ self.k.weight
        seen = states + self.positions[:, None, None]
        cls = self.cls.expand(1, *states.shape[1:])
        rows = torch.cat([cls, seen])
        attention = torch.softmax(rows @ u, dim=0)
        o = self.o(self.v(torch.einsum("lbs,lbsd->bsd", attention, rows)))
        y = self.attn_norm(self.cls + o)
        z = self.mlp_norm(y + self.down(functional.relu(self.up(y))))
        weights = torch.softmax(self.weigh(z), dim=-1)
        return torch.einsum("bsl,lbsd->bsd", weights, states) * mask[:, :, None]


class Projector(Float32):
    """Encoder width → LLM width for each token, followed by the end vector.

    `linear`; `ffn` with exact GELU (LangBridge); `mapping` with ReLU (MindMerger).
    """

    def __init__(self, width_in, width_out, name, d_ff):
        super().__init__()
        self.activation = functional.relu if name == "mapping" else functional.gelu
        self.hidden = None if name == "linear" else nn.Linear(width_in, d_ff)
        self.out = nn.Linear(width_in if name == "linear" else d_ff, width_out)
        self.end = nn.Parameter(torch.zeros(width_out))

    def forward(self, features, mask):
        if self.hidden is not None:
            features = self.activation(self.hidden(features))
        prefix = self.out(features)
        return prefix, mask, self.end


class Resampler(Float32):
    """A fixed number of slots that attend to the features (LangBridge's `latent`)."""

    def __init__(self, width_in, width_out, latents, heads=8, head_dim=64):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.latents = nn.Parameter(torch.zeros(latents, width_in))
        self.feature_norm, self.latent_norm = nn.LayerNorm(width_in), nn.LayerNorm(width_in)
        self.q, self.k, self.v = (nn.Linear(width_in, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, width_in, bias=False)
        self.up, self.down = nn.Linear(width_in, 4 * width_in), nn.Linear(4 * width_in, width_in)
        self.out = nn.Linear(width_in, width_out, bias=False)
        self.end = nn.Parameter(torch.zeros(width_out))
        self.norm = nn.LayerNorm(width_out)

    def forward(self, features, mask):
        latents = self.latents.expand(len(features), -1, -1)
        asking = self.latent_norm(latents)
        seen = torch.cat([self.feature_norm(features), asking], dim=1)
        visible = torch.cat([mask.bool(), mask.new_ones(asking.shape[:2]).bool()], dim=1)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for layer, x in ((self.q, asking), (self.k, seen), (self.v, seen)))
        mixed = functional.scaled_dot_product_attention(q, k, v, visible[:, None, None])
        y = latents + self.o(mixed.transpose(1, 2).flatten(2))
        y = self.out(y + self.down(functional.gelu(self.up(y))))
        return self.norm(y), mask.new_ones(y.shape[:2]), self.norm(self.end)


class Aligner(Float32):
    """LayAlign: a key source and a value source for each LLM layer, from all encoder states."""

    def __init__(self, states, width_in, width_out, name, layers, padding):
        super().__init__()
        self.padding = padding
        self.mix = nn.Linear(states, 2 * layers)
        self.hidden = nn.Linear(width_in, width_out) if name == "mlp" else None
        self.out = nn.Linear(width_out if name == "mlp" else width_in, width_out)
        self.gate = nn.Parameter(torch.zeros(layers))

    def forward(self, states):
        x = functional.relu(self.mix(states.movedim(0, -1))).movedim(-1, 0)
        if self.hidden is not None:
            x = functional.relu(self.hidden(x))
        return self.out(x)


def read_extra(attention, sources, gate, mask, like):
    """What an LLM layer's attention reads of its sources [2 B S E] by its own maps: keys and
    values [B K S H], its gate, and their mask. `like` has the dtype that the layer computes in."""
    device = attention.o_proj.weight.device
    keys, values = sources.to(like.device if device.type == "meta" else device, like.dtype)
    if hasattr(attention, "qkv_proj"):  # Phi-3's are one map
        heads = attention.o_proj.in_features
        width = (attention.qkv_proj.out_features - heads) // 2
        k, v = attention.qkv_proj(keys), attention.qkv_proj(values)
        k, v = k[..., heads:heads + width], v[..., heads + width:]
    else:
        k, v = attention.k_proj(keys), attention.v_proj(values)
    k, v = (x.unflatten(-1, (-1, attention.head_dim)) for x in (k, v))
    if hasattr(attention, "k_norm"):
        k = attention.k_norm(k)
    return k.transpose(1, 2), v.transpose(1, 2), gate, mask


def aligned(usual):
    """An attention of transformers (None: a model's own eager one) that adds what a layer reads of
    its sources, if it has any."""
    def attend(module, query, key, value, attention_mask, **kwargs):
        forward = usual or sys.modules[type(module).__module__].eager_attention_forward
        mixed, weights = forward(module, query, key, value, attention_mask, **kwargs)
        if getattr(module, "extra", None) is None:
            return mixed, weights
        k, v, gate, mask = module.extra
        beams, groups = len(query) // len(k), query.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(beams, 0).repeat_interleave(groups, 1) for x in (k, v))
        scores = query @ k.transpose(2, 3) * kwargs["scaling"]
        if kwargs.get("softcap") is not None:
            scores = kwargs["softcap"] * torch.tanh(scores / kwargs["softcap"])
        scores = scores.float().masked_fill(
            ~mask.to(k.device).repeat_interleave(beams, 0)[:, None, None], -1e30)
        read = torch.softmax(scores, -1).to(v.dtype) @ v
        return mixed + gate.to(mixed.device, mixed.dtype) * read.transpose(1, 2), weights

    return attend


def make_projector(projector, width_in, width_out):
    """The projector of a config."""
    if projector["name"] == "resampler":
        return Resampler(width_in, width_out, projector["latents"])
    return Projector(width_in, width_out, projector["name"], projector["d_ff"])


def make_fusion(fusion, encoder):
    """The fusion of a config."""
    layers, width = encoder["layers"], encoder["width"]
    return {
        "last": Last, "layer": lambda: Layer(fusion["layer"]),
        "global_softmax": lambda: GlobalSoftmax(layers),
        "transformer_softmax": lambda: TransformerSoftmax(layers, width, fusion["d_ff"]),
    }[fusion["name"]]()


def read_weights(path, revision, hub):
    """The trained part's tensors, from one file or from shards with an index."""
    def find(name):
        if os.path.isdir(path):
            file = os.path.join(path, name)
            return file if os.path.isfile(file) else None
        return cached_file(path, name, revision=revision,
                           _raise_exceptions_for_missing_entries=False, **hub)

    index = find(f"{WEIGHTS}.index.json")
    if index is None:
        return load_file(find(WEIGHTS))
    with open(index, encoding="utf-8") as file:
        names = set(json.load(file)["weight_map"].values())
    return {key: x for name in sorted(names) for key, x in load_file(find(name)).items()}


def fingerprint(x):
    """A checksum of a tensor's bits, to detect changes."""
    bits = x.detach().contiguous().flatten().view(torch.uint8)
    wide = bits.view(torch.int32) if bits.numel() % 4 == 0 else bits
    return x.dtype, wide.sum(dtype=torch.int64).item()


class WithPrompt:
    """Wraps a user's logits processor or stopping criterion, which expects the prompt's ids."""

    def __init__(self, inner, prompt):
        self.inner, self.prompt = inner, prompt

    def __call__(self, input_ids, scores, **kwargs):
        prompt = self.prompt.repeat_interleave(len(input_ids) // len(self.prompt), dim=0)
        return self.inner(torch.cat([prompt, input_ids], dim=1), scores, **kwargs)


class BridgeForCausalLM(PreTrainedModel, GenerationMixin):
    """Reads with the encoder, answers with the LLM; padding may be on either side.

    A row of `input_ids` is a query, its prompt (if the bridge has one for each query) and the
    answer so far: see `tokenization_jaxfusion.py`. Encoder and LLM are frozen, except for
    parameters that were trained.
    """

    config_class = BridgeConfig
    main_input_name = "input_ids"
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = _supports_flash_attn = _supports_flash_attn_2 = _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config, encoder=None, decoder=None):
        super().__init__(config)
        if encoder is None or decoder is None:
            raise ValueError("use from_pretrained: the two backbones have files of their own")
        self.encoder, self.decoder = encoder, decoder
        self.fusion = make_fusion(config.fusion, config.reader)
        self.projector = make_projector(config.projector, config.reader["width"],
                                        config.writer["width"])
        self.aligner = None
        if config.aligner["name"] != "none":
            self.aligner = Aligner(config.reader["layers"], config.reader["width"],
                                   config.writer["width"], **config.aligner)
        self.generation_config = GenerationConfig(
            eos_token_id=config.eos_token_id, pad_token_id=config.query_pad_id,
            bos_token_id=config.bos_token_id)
        self.all_tied_weights_keys = {}  # of this module; its two models tie their own
        self._read = {}  # what was loaded: fingerprints and their source

    @classmethod
    def from_pretrained(cls, path, *args, config=None, **kwargs):
        """As in transformers; the trained part is float32.

        Keyword arguments go to both backbones (device_map, token, …), `attn_implementation` only to
        the LLM. `dtype` applies to the backbones; by default each keeps its stored dtype.

        Raises:
          ValueError: an unsupported argument, or weights that do not match.
        """
        refused = [name for name in ("subfolder", "state_dict", "output_loading_info", "gguf_file",
                                     "variant", "adapter_name") if kwargs.pop(name, None)]
        if args or refused:
            raise ValueError(f"a bridge does not take {', '.join(refused) or args}; remove it")
        for name in ("trust_remote_code", "code_revision", "_from_auto", "adapter_kwargs"):
            kwargs.pop(name, None)
        revision = kwargs.pop("revision", None)
        hub = {key: kwargs[key] for key in ("cache_dir", "token", "local_files_only")
               if kwargs.get(key) is not None}
        asked = kwargs.pop("attn_implementation", None)
        if config is None:
            config = BridgeConfig.from_pretrained(path, revision=revision, **hub)
        elif asked is None:  # where AutoModelForCausalLM leaves it
            asked = getattr(config, "_attn_implementation", None)
        attention = cls._attention(asked, config.writer["capped"])
        if config.aligner["name"] != "none":
            attention = cls._aligned(attention.get("attn_implementation", "sdpa"))
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        kwargs.pop("torch_dtype", None)

        def backbone(kind, part, **more):
            chosen = getattr(torch, part["dtype"]) if dtype in (None, "auto") else dtype
            settings = {**kwargs, DTYPE: chosen, **more}
            if part["inside"]:
                return kind.from_pretrained(path, subfolder=part["checkpoint"],
                                            revision=revision or "main", **settings)
            return kind.from_pretrained(part["checkpoint"],
                                        revision=part["revision"] or "main", **settings)

        family = config.reader["family"]
        pooling = {"add_pooling_layer": False} if family in ("bert", "xlm-roberta") else {}
        kind = getattr(transformers, ENCODERS[family])
        if family == "m2m_100" and config.reader["alone"]:
            kind = import_module(kind.__module__).M2M100Encoder
        encoder = backbone(kind, config.reader, **pooling)
        if family == "m2m_100" and not config.reader["alone"]:
            encoder = encoder.encoder
        decoder = backbone(AutoModelForCausalLM, config.writer, **attention)
        model = cls(config, encoder, decoder)
        model._read = {"from": (path, {"revision": revision, **hub}), "bits": {
            name: None if x.is_meta else fingerprint(x) for name, x in model._of_backbones()}}
        model._load_trained(read_weights(path, revision, hub), path)
        places = {role: getattr(getattr(model, role), "hf_device_map", None) for role in ROLES}
        if all(places.values()):  # accelerate placed them; they must not be moved
            model.hf_device_map = {f"{role}.{name}".rstrip("."): place
                                   for role, device_map in places.items()
                                   for name, place in device_map.items()}
        try:
            model.generation_config = GenerationConfig.from_pretrained(
                path, revision=revision or "main", **hub)
        except OSError:  # the directory has none
            logger.warning("%s has no generation_config.json: set max_new_tokens", path)
        return model.eval()

    @staticmethod
    def _attention(requested, capped):
        """The LLM's attention, as a keyword argument.

        Raises:
          ValueError: an implementation that ignores the cap of the scores.
        """
        if capped and requested in (None, "eager"):
            return {"attn_implementation": "eager"}  # faster kernels ignore the cap
        if capped and requested == "sdpa":
            raise ValueError("attn_implementation='sdpa' ignores the cap of this LLM's attention "
                             "scores; remove it, or set it to 'eager'")
        return {} if requested is None else {"attn_implementation": requested}

    @staticmethod
    def _aligned(kind):
        """The LLM's attention with what an aligner adds, as a keyword argument.

        Raises:
          ValueError: an implementation that it cannot be added to.
        """
        if kind not in ("eager", "sdpa"):
            raise ValueError(f"attn_implementation={kind!r} is not for a bridge with an aligner; "
                             "set it to 'sdpa' or 'eager'")
        # From transformers 4.53 on.
        masks = import_module("transformers.masking_utils").ALL_MASK_ATTENTION_FUNCTIONS
        functions = import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
        name = f"jaxfusion_{kind}"
        functions.register(name, aligned(None if kind == "eager" else functions[kind]))
        masks.register(name, masks[kind])
        return {"attn_implementation": name}

    def _load_trained(self, trained, path):
        """Loads the trained part and freezes the rest."""
        own = {name for name in self.state_dict() if name.startswith(OWN)}
        outcome = self.load_state_dict(trained, strict=False)
        missing = own - trained.keys()
        if missing or outcome.unexpected_keys:
            raise ValueError(f"{path}: missing {sorted(missing)}, "
                             f"unexpected {outcome.unexpected_keys}")
        for name, x in self._of_backbones():
            x.requires_grad_(name in self.config.unfrozen)
        device = self.decoder.get_input_embeddings().weight.device
        for name in OWN:
            part = getattr(self, name.rstrip("."))
            if part is not None:
                part.to(device)
        self._keys_to_ignore_on_save = sorted(self.state_dict().keys() - trained.keys())

    def _of_backbones(self):
        """The parameters of encoder and LLM by name, tied ones once."""
        for role in ROLES:
            for name, x in getattr(self, role).named_parameters():
                yield f"{role}.{name}", x

    # Forward and generate.

    def prefix(self, input_ids, attention_mask=None):
        """Encoder ids [B S] → the prefix [B P E], its mask [B P], and the end vector [E]."""
        return self._read_query(input_ids, attention_mask)[0]

    def _read_query(self, input_ids, attention_mask=None):
        """The prefix, its mask and the end vector; and what the LLM's layers read besides: their
        sources [2M B S E] and the mask of these, or None."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        out = self.encoder(input_ids=input_ids, attention_mask=attention_mask,
                           output_hidden_states=True)
        # The last one after the final norm, which ModernBERT's lacks in transformers 4.
        states = (*out.hidden_states[:-1], out.last_hidden_state)
        device = self.projector.end.device
        states = torch.stack(states).to(device, torch.float32)
        mask = attention_mask.to(device)
        prefix = self.projector(self.fusion(states[1:], mask), mask)
        if self.aligner is None:
            return prefix, None
        padding = self.aligner.padding
        sources = self.aligner(states[:-1] if padding else states[1:])
        return prefix, (sources, torch.ones_like(mask) if padding else mask)

    @contextmanager
    def _with_extra(self, extra, embeds):
        """The LLM's layers read `extra` inside this context; `embeds` are their inputs.

        Raises:
          ValueError: a setting under which they would not.
        """
        layers = [] if extra is None else [
            layer.self_attn for layer in self.decoder.get_decoder().layers]
        kind = self.decoder.config._attn_implementation
        if layers and not str(kind).startswith("jaxfusion_"):
            raise ValueError(f"the LLM's attention was set to {kind!r}, which leaves the aligner "
                             "out: give attn_implementation to from_pretrained")
        if layers and self.training and getattr(self.decoder, "is_gradient_checkpointing", False):
            raise ValueError("gradient checkpointing computes the LLM's layers again without the "
                             "aligner: call gradient_checkpointing_disable()")
        try:
            for i, attention in enumerate(layers):
                sources, mask = extra
                attention.extra = read_extra(attention, sources[2 * i:2 * i + 2],
                                             self.aligner.gate[i], mask.bool(), embeds)
            yield
        finally:
            for attention in layers:
                attention.extra = None

    def _mask(self, input_ids, attention_mask):
        """The mask of tokens that are not padding. [B S]

        Raises:
          ValueError: rows that are not query, prompt, answer in this order.
        """
        c, real = self.config, input_ids != self.config.query_pad_id
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(f"attention_mask is {list(attention_mask.shape)}, expected the "
                                 f"{list(input_ids.shape)} of input_ids")
            real &= attention_mask.bool()
        for row, (ids, is_real) in enumerate(zip(input_ids, real, strict=True)):
            ids = ids[is_real]
            kinds = (ids < c.query_offset).int() + (ids < c.prompt_offset).int()
            query = ids[kinds == 1]
            if not len(query):
                raise ValueError(
                    f"row {row} of input_ids has no query: make it with "
                    "AutoTokenizer.from_pretrained(DIR, trust_remote_code=True), not with the "
                    "tokenizer of the LLM or of the encoder")
            order = torch.tensor([1, 0, 2], device=ids.device)[kinds]  # query, prompt, answer
            if (order.diff() < 0).any():
                raise ValueError(f"row {row} of input_ids is not a query, its prompt and an answer "
                                 "in this order")
            if c.query_end_id is not None and query[-1] != c.query_end_id:
                raise ValueError(
                    f"the query in row {row} of input_ids does not end in the encoder's end token: "
                    "it was truncated, or an answer was given as a query (as lm-eval's `--model "
                    "hf` does; use `python -m jaxfusion.runs.lm_harness`)")
            if (c.after_ids is None) != bool((kinds == 0).any()):
                raise ValueError(f"row {row} of input_ids has "
                                 f"{'no' if c.after_ids is None else 'a'} prompt after its query: "
                                 "it is not from this bridge's tokenizer")
        return real

    def splice(self, input_ids, attention_mask=None):
        """The LLM's input rows: `start + prefix + end + prompt + answer` without gaps.

        Returns:
          Embeddings [B T E] with padding on the left, their mask [B T], for every id the slot
          whose logits predict the next id [B S], -1 before the end of the query; and what the
          LLM's layers read besides.

        Raises:
          ValueError: ids that are not from this bridge's tokenizer.
        """
        c, real = self.config, self._mask(input_ids, attention_mask)
        queries = [ids[is_real & (ids >= c.query_offset) & (ids < c.prompt_offset)] - c.query_offset
                   for ids, is_real in zip(input_ids, real, strict=True)]
        enc_ids = nn.utils.rnn.pad_sequence(queries, batch_first=True,
                                            padding_value=c.query_pad_id - c.query_offset)
        enc_mask = nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in queries],
                                             batch_first=True)
        device = self.encoder.get_input_embeddings().weight.device
        (prefix, mask, end), extra = self._read_query(enc_ids.to(device), enc_mask.to(device))
        table = self.decoder.get_input_embeddings()
        prefix, end = (x.to(table.weight.dtype) / self._scale(table) for x in (prefix, end))
        start, after = (torch.tensor(ids or [], dtype=torch.long, device=prefix.device)
                        for ids in (c.start_ids, c.after_ids))
        rows, slots = [], []
        for i, (ids, is_real) in enumerate(zip(input_ids, real, strict=True)):
            text = is_real & ((ids < c.query_offset) | (ids >= c.prompt_offset))
            tokens = torch.where(ids < c.query_offset, ids, ids - c.prompt_offset)[text]
            before = torch.cat([table(start), prefix[i][mask[i].bool()], end[None], table(after)])
            rows.append(torch.cat([before, table(tokens.to(prefix.device))]))
            last = torch.where(is_real & (ids >= c.query_offset) & (ids < c.prompt_offset))[0][-1]
            next_slots = len(before) - 1 + text.cumsum(0)
            before_end = torch.arange(len(ids), device=ids.device) < last
            slots.append(torch.where(before_end, -1, next_slots))
        longest = max(map(len, rows))
        left = [longest - len(row) for row in rows]
        embeds = torch.stack([functional.pad(row, (0, 0, n, 0))
                              for n, row in zip(left, rows, strict=True)])
        real = torch.tensor([[0] * n + [1] * len(row) for n, row in zip(left, rows, strict=True)],
                            device=embeds.device)
        slots = torch.stack([torch.where(x < 0, x, x + n)
                             for n, x in zip(left, slots, strict=True)])
        return embeds, real, slots.to(embeds.device), extra

    def _scale(self, table):
        """The factor that the LLM applies to its input embeddings after the table (Gemma 1 and 2 in
        some releases)."""
        if self.decoder.config.model_type not in ("gemma", "gemma2") or hasattr(
                table, "embed_scale"):
            return 1.0
        scales = "normalizer" in inspect.getsource(type(self.decoder.get_decoder()).forward)
        width = torch.tensor(self.config.writer["width"] ** 0.5, dtype=table.weight.dtype)
        return width.item() if scales else 1.0

    def forward(self, input_ids=None, attention_mask=None, labels=None, *, inputs_embeds=None,
                position_ids=None, past_key_values=None, use_cache=None, output_attentions=None,
                output_hidden_states=None, return_dict=None, num_items_in_batch=None):
        """Logits [B S V] for the id after each id; 0 before the end of the query.

        Args:
          input_ids, attention_mask: [B S], from the tokenizer.
          labels: [B S], the ids of answers in `input_ids` to be learned, -100 elsewhere; the loss
            is their mean, or the sum over `num_items_in_batch`.
          output_hidden_states: also return the LLM's states [B S E], aligned with the logits.

        Raises:
          ValueError: ids of another tokenizer, labels that are not in `input_ids`, or an
            unsupported argument.
        """
        given = {"inputs_embeds": inputs_embeds, "position_ids": position_ids,
                 "past_key_values": past_key_values, "use_cache": use_cache,
                 "output_attentions": output_attentions}
        if refused := [name for name, x in given.items() if x is not None and x is not False]:
            raise ValueError(f"a bridge's forward takes no {', '.join(refused)}: its rows are full "
                             "queries for the encoder; generate has its own cache")
        if input_ids is None:
            raise ValueError("input_ids are missing")
        if output_hidden_states is None:
            output_hidden_states = bool(getattr(self.config, "output_hidden_states", False))
        embeds, real, slots, extra = self.splice(input_ids, attention_mask)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        with self._with_extra(extra, embeds):
            outputs = self.decoder(
                inputs_embeds=embeds, attention_mask=real, position_ids=positions, use_cache=False,
                output_hidden_states=output_hidden_states)

        def placed(x):
            gathered = x[torch.arange(len(x), device=x.device)[:, None], slots.clamp(min=0)]
            return gathered * (slots >= 0)[..., None]

        logits = placed(outputs.logits)
        loss = None if labels is None else self._loss(logits, input_ids, labels,
                                                      num_items_in_batch)
        states = tuple(map(placed, outputs.hidden_states)) if output_hidden_states else None
        output = CausalLMOutput(loss=loss, logits=logits, hidden_states=states)
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        return output if return_dict else output.to_tuple()

    def _loss(self, logits, input_ids, labels, count):
        """Mean negative log-likelihood of the labels.

        Raises:
          ValueError: labels that are not answers in `input_ids`.
        """
        if labels.shape != input_ids.shape:
            raise ValueError(f"labels are {list(labels.shape)}, expected the "
                             f"{list(input_ids.shape)} of input_ids: make both with "
                             "tokenizer(texts, text_target=answers)")
        is_label = labels != IGNORED
        if (is_label & ((labels != input_ids) | (labels >= self.config.query_offset))).any():
            raise ValueError("expected labels that are -100 or ids of answers in input_ids, got "
                             "others: make them with tokenizer(texts, text_target=answers)")
        chosen = is_label[:, 1:].to(logits.device)
        targets = labels[:, 1:].to(logits.device)[chosen]
        total = functional.cross_entropy(logits[:, :-1][chosen].float(), targets, reduction="sum")
        return total / (max(len(targets), 1) if count is None else count)

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, *, input_ids=None,
                 attention_mask=None, logits_processor=None, stopping_criteria=None,
                 prefix_allowed_tokens_fn=None, streamer=None, tokenizer=None, synced_gpus=None,
                 **kwargs):
        """The LLM's `generate`; returns `input_ids` and the new tokens after them.

        `generation_config` overrides this model's own, and arguments override both; the LLM's
        `generation_config.json` is ignored.

        Raises:
          ValueError: ids that are not from this bridge's tokenizer.
          TypeError: an unsupported argument.
        """
        ids = inputs if input_ids is None else input_ids
        if ids is None or (inputs is not None and input_ids is not None):
            raise ValueError("expected input_ids once")
        if not isinstance(generation_config, (GenerationConfig, type(None))):
            raise TypeError(f"generation_config is a {type(generation_config).__name__}, expected "
                            "GenerationConfig; give attention_mask by its name")
        settings, unknown = self._prepare_generation_config(generation_config, **kwargs)
        states = ("output_attentions", "output_hidden_states")  # also in the settings
        unknown = [name for name, x in unknown.items()
                   if x is not None and x is not False and name not in states]
        if unknown:
            raise TypeError(f"a bridge's generate takes no {', '.join(unknown)}")
        chosen = {} if generation_config is None else generation_config.to_diff_dict()
        self._settle(settings, ids.shape[1], {**chosen, **kwargs})
        embeds, real, _, extra = self.splice(ids, attention_mask)
        prompt = ids.to(embeds.device)
        more = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
        more = {name: type(x)(WithPrompt(inner, prompt) for inner in x)
                for name, x in more.items() if x}
        if prefix_allowed_tokens_fn is not None:
            more["prefix_allowed_tokens_fn"] = lambda i, new: prefix_allowed_tokens_fn(
                i, torch.cat([prompt[i], new]))
        # generate would fill unset fields from the LLM's own config.
        own, self.decoder.generation_config = self.decoder.generation_config, settings
        try:
            with self._with_extra(extra, embeds):
                output = self.decoder.generate(
                    inputs_embeds=embeds, attention_mask=real, generation_config=settings,
                    streamer=streamer, tokenizer=getattr(tokenizer, "answers", tokenizer),
                    synced_gpus=synced_gpus, **more)
        finally:
            self.decoder.generation_config = own
        new = output if isinstance(output, torch.Tensor) else output.sequences
        repeats = len(new) // len(prompt)
        sequences = torch.cat([prompt.repeat_interleave(repeats, dim=0), new], dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output

    def _settle(self, settings, asked, chosen):
        """Adapts lengths and the padding token to the LLM, which does not see `input_ids`.

        Args:
          settings: modified in place. asked: number of ids in a row of input. chosen: the call's
            own settings.

        Raises:
          ValueError: a total length that the input already has.
        """
        unset = GenerationConfig()
        for kind in ("max", "min"):
            new, total = f"{kind}_new_tokens", f"{kind}_length"
            length, usual = getattr(settings, total), getattr(unset, total)
            if (chosen.get(total) or (getattr(settings, new) is None and length != usual)) and (
                    chosen.get(new) is None):
                setattr(settings, new, length - asked if kind == "max" else max(length - asked, 0))
            setattr(settings, total, usual)
        if settings.max_new_tokens is not None and settings.max_new_tokens < 1:
            raise ValueError(f"max_length leaves nothing to generate after {asked} ids of input; "
                             "set max_new_tokens")
        ends = settings.eos_token_id
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        if settings.pad_token_id is None or settings.pad_token_id >= self.config.query_offset:
            settings.pad_token_id = next((x for x in ends if x is not None), 0)

    def _prepare_generation_config(self, generation_config, use_model_defaults=None, **kwargs):
        """As in transformers, without a pipeline's own defaults."""
        if use_model_defaults:
            generation_config = None
        return super()._prepare_generation_config(generation_config, **kwargs)

    # The interface that transformers, peft and others expect of a model.

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        """The arguments of `forward`."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def _apply(self, fn, *args, **kwargs):
        """As in torch, but buffers such as rotary frequencies keep their precision, as they do when
        a model is loaded in another dtype."""
        buffers = [(module, name, x) for module in self.modules()
                for name, x in module.named_buffers(recurse=False)]
        super()._apply(fn, *args, **kwargs)
        for module, name, x in buffers:
            now = getattr(module, name)
            if now.dtype != x.dtype:
                setattr(module, name, x.to(now.device))
        return self

    def train(self, mode=True):
        """As in torch; the encoder has no dropout unless it trains."""
        super().train(mode)
        if not any(x.requires_grad for x in self.encoder.parameters()):
            self.encoder.eval()
        return self

    def get_input_embeddings(self):
        """The LLM's table of input embeddings."""
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value):
        """Sets it."""
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self):
        """The LLM's head."""
        return self.decoder.get_output_embeddings()

    def set_output_embeddings(self, value):
        """Sets it."""
        self.decoder.set_output_embeddings(value)

    def tie_weights(self, *args, **kwargs):
        """Each of the two models ties its own weights."""
        for role in ROLES:
            getattr(self, role).tie_weights(*args, **kwargs)

    def resize_token_embeddings(self, *args, **kwargs):
        """Raises ValueError: ids above the LLM's are the encoder's."""
        raise ValueError("a bridge's tables are those of its two models: they cannot be resized")

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None,
                        push_to_hub=False, **kwargs):
        """Writes a directory that loads again: backbones by name, or inside it as when loaded.

        Changed parameters of backbones by name are written, too. The tokenizers are written if
        their files can still be read.

        Raises:
          ValueError: the model has adapters, or weights that are not in memory.
        """
        if not is_main_process:
            return
        out = os.fspath(save_directory)
        state = {name: x for name, x in (state_dict or self.state_dict()).items()
                 if not getattr(x, "is_meta", False)}
        names = [*self._read["bits"], *(name for name, _ in self.named_parameters()
                                        if name.startswith(OWN))]
        if missing := [name for name in names if name not in state]:
            raise ValueError(f"{', '.join(missing[:3])} … are not in memory under these names: "
                             "merge adapters (merge_and_unload) or save them alone, and load "
                             "without offloading")
        trained = {name: x for name, x in state.items() if name in names and (
            name not in self._read["bits"] or self._read["bits"][name] != fingerprint(x))}
        os.makedirs(out, exist_ok=True)
        _write(os.path.join(out, WEIGHTS), trained)
        self._keys_to_ignore_on_save = sorted(state.keys() - trained.keys())
        config = copy.deepcopy(self.config)
        config.auto_map, config.architectures = dict(AUTO_MAP), [type(self).__name__]
        config.unfrozen = [name for name, x in self._of_backbones() if x.requires_grad]
        for role, part in ROLES.items():
            dtype = next(getattr(self, role).parameters()).dtype
            getattr(config, part)["dtype"] = str(dtype).removeprefix("torch.")
        config.to_json_file(os.path.join(out, "config.json"))
        self.generation_config.save_pretrained(out)
        for name in CODE:
            here = os.path.join(os.path.dirname(__file__), name)
            if os.path.realpath(here) != os.path.realpath(os.path.join(out, name)):
                shutil.copyfile(here, os.path.join(out, name))
        for role, part in ROLES.items():
            if getattr(config, part)["inside"]:
                self._save_backbone(role, getattr(config, part), out, state)
        self._save_tokenizers(config, out)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(out)), **kwargs)

    def _save_backbone(self, role, part, out, state):
        """Writes one model to its own directory, with the config.json that it was loaded with."""
        path, hub = self._read["from"]
        folder = os.path.join(out, part["checkpoint"])
        os.makedirs(folder, exist_ok=True)
        _write(os.path.join(folder, WEIGHTS), {
            name.removeprefix(f"{role}."): state[name] for name, _ in self._of_backbones()
            if name.startswith(f"{role}.")})
        for name in ("config.json", "generation_config.json"):
            file = cached_file(path, name, subfolder=part["checkpoint"],
                               _raise_exceptions_for_missing_entries=False, **hub)
            if file is not None:
                with open(file, encoding="utf-8") as opened:
                    content = json.load(opened)
                if name == "config.json":
                    content |= {"dtype": part["dtype"], "torch_dtype": part["dtype"]}
                with open(os.path.join(folder, name), "w", encoding="utf-8") as opened:
                    json.dump(content, opened, indent=2)

    def _save_tokenizers(self, config, out):
        path, hub = self._read["from"]
        try:
            tokenizer = BridgeTokenizer.from_pretrained(path, **hub)
        except OSError as error:
            logger.warning("the tokenizers were not written (%s): save them with "
                           "tokenizer.save_pretrained", str(error).splitlines()[0])
            return
        tokenizer.save_pretrained(out)
        for part, inner in ((config.reader, tokenizer.queries), (config.writer, tokenizer.answers)):
            if part["inside"]:
                write_tokenizer(os.path.join(out, part["checkpoint"]), inner)


def _write(file, tensors):
    """Writes tensors, shared or not, through a temporary file: they may be mapped from `file`."""
    tensors = {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}
    save_file(tensors, f"{file}.partial", metadata={"format": "pt"})
    os.replace(f"{file}.partial", file)
