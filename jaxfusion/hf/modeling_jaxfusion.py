"""A bridge exported by jaxfusion, in PyTorch: multilingual encoder → fusion → projector → LLM.

    model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)
    queries = AutoTokenizer.from_pretrained(DIR, subfolder="encoder_tokenizer")
    answers = AutoTokenizer.from_pretrained(DIR, trust_remote_code=True)
    tokens = model.generate(**queries(texts, padding=True, return_tensors="pt"), max_new_tokens=32)
    answers.batch_decode(tokens, skip_special_tokens=True)

Self-contained: needs torch, transformers (4 or 5) and safetensors. Methods: LangBridge
(arXiv:2401.10695), Global and Transformer Softmax (arXiv:2508.09091).
"""

import inspect
import json
import os

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    MT5EncoderModel,
    PretrainedConfig,
    PreTrainedModel,
    UMT5EncoderModel,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import cached_file

WEIGHTS = "model.safetensors"


class BridgeConfig(PretrainedConfig):
    """The four parts.

    Args:
      reader, writer: of encoder and LLM `checkpoint` (a hub id, or a folder inside this one where
        `inside` is true), `revision`, `width`, `dtype`; of the reader also `layers` and `family`,
        of the writer `capped`: its attention scores have a soft cap.
      fusion: `name`, `layer` and `d_ff`.
      projector: `name`, `d_ff` and `latents`.
      start_ids: what every row of the LLM starts with: BOS, or the header of a chat.
      after_ids: what follows the prefix where no text is given; None where every input has its own.
    """

    model_type = "jaxfusion_bridge"

    def __init__(self, reader=None, writer=None, fusion=None, projector=None, start_ids=(),
                 after_ids=(), **kwargs):
        self.reader, self.writer = reader or {}, writer or {}
        self.fusion, self.projector = fusion or {}, projector or {}
        self.start_ids = list(start_ids)
        self.after_ids = after_ids if after_ids is None else list(after_ids)
        super().__init__(**kwargs)


class Last(nn.Module):
    """The last layer (LangBridge)."""

    def forward(self, states, mask):
        return states[-1]


class Layer(nn.Module):
    """One fixed layer, counted from 1."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, states, mask):
        return states[self.layer - 1]


class GlobalSoftmax(nn.Module):
    """One weight per layer: softmax((100 + 1e5·t)·w)."""

    def __init__(self, layers):
        super().__init__()
        self.w, self.t = nn.Parameter(torch.zeros(layers)), nn.Parameter(torch.zeros(()))

    def forward(self, states, mask):
        weights = torch.softmax((100.0 + 1e5 * self.t) * self.w, dim=0)
        return torch.einsum("l,lbsd->bsd", weights, states)


class TransformerSoftmax(nn.Module):
    """Weights of every token, by one post-norm transformer layer over `[cls, h_1+p_1, …]`.

    Only the cls row is read, and its query is the same for every token: so the layer collapses to
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


class Projector(nn.Module):
    """Encoder width → LLM width for each token, and the end vector after them.

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


class Resampler(nn.Module):
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


def make_projector(projector, width_in, width_out):
    if projector["name"] == "resampler":
        return Resampler(width_in, width_out, projector["latents"])
    return Projector(width_in, width_out, projector["name"], projector["d_ff"])


def make_fusion(fusion, encoder):
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


class BridgeForCausalLM(PreTrainedModel):
    """Reads with the encoder, answers with the LLM; padding may lie on either side."""

    config_class = BridgeConfig
    main_input_name = "input_ids"

    def __init__(self, config, encoder=None, decoder=None):
        super().__init__(config)
        if encoder is None or decoder is None:
            raise ValueError("use from_pretrained: the two backbones have files of their own")
        self.encoder, self.decoder = encoder, decoder
        self.fusion = make_fusion(config.fusion, config.reader)
        self.projector = make_projector(config.projector, config.reader["width"],
                                        config.writer["width"])
        self.generation_config = decoder.generation_config

    @classmethod
    def from_pretrained(cls, path, *args, config=None, **kwargs):
        """As in transformers; the trained part is float32.

        Keyword arguments go to both backbones (device_map, token, …), `attn_implementation` to the
        LLM alone. `dtype` is that of the backbones; without it each has the one it was stored in.
        """
        for name in ("trust_remote_code", "code_revision", "_from_auto", "adapter_kwargs",
                     "subfolder"):
            kwargs.pop(name, None)
        revision = kwargs.pop("revision", None)
        hub = {key: kwargs[key] for key in ("cache_dir", "token", "local_files_only")
               if kwargs.get(key) is not None}
        asked = kwargs.pop("attn_implementation", None)
        if config is None:
            config = BridgeConfig.from_pretrained(path, revision=revision, **hub)
        elif asked is None:  # where AutoModelForCausalLM leaves it
            asked = getattr(config, "_attn_implementation", None)
        if asked is None and config.writer["capped"]:
            asked = "eager"  # the faster kernels of some releases leave out the cap
        attention = {} if asked is None else {"attn_implementation": asked}
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        dtype_field = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"

        def backbone(kind, part, **more):
            stored = getattr(torch, part["dtype"])
            settings = {**kwargs, dtype_field: dtype or stored, **more}
            if part["inside"]:
                return kind.from_pretrained(path, subfolder=part["checkpoint"],
                                            revision=revision or "main", **settings)
            return kind.from_pretrained(part["checkpoint"],
                                        revision=part["revision"] or "main", **settings)

        families = {"mt5": MT5EncoderModel, "umt5": UMT5EncoderModel}
        encoder = backbone(families[config.reader["family"]], config.reader)
        decoder = backbone(AutoModelForCausalLM, config.writer, **attention)
        model = cls(config, encoder, decoder)
        trained = read_weights(path, revision, hub)
        own = {name for name in model.state_dict() if name.startswith(("fusion.", "projector."))}
        outcome = model.load_state_dict(trained, strict=False)
        missing = own - trained.keys()
        if missing or outcome.unexpected_keys:
            raise ValueError(f"{path}: missing {sorted(missing)}, "
                             f"unexpected {outcome.unexpected_keys}")
        device = decoder.get_input_embeddings().weight.device
        model.fusion.to(device)
        model.projector.to(device)
        return model.eval()

    def prefix(self, input_ids, attention_mask=None):
        """Encoder ids [B S] → the prefix [B P E], its mask [B P], and the end vector [E]."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask,
                              output_hidden_states=True).hidden_states[1:]
        device = self.projector.end.device
        states = torch.stack(states).to(device, torch.float32)
        mask = attention_mask.to(device)
        return self.projector(self.fusion(states, mask), mask)

    def splice(self, input_ids, attention_mask=None, decoder_input_ids=None,
               decoder_attention_mask=None):
        """`start + prefix + end + text` of every row without gaps, padding on the left."""
        prefix, mask, end = self.prefix(input_ids, attention_mask)
        table = self.decoder.get_input_embeddings()
        if decoder_input_ids is None:
            if self.config.after_ids is None:
                raise ValueError("decoder_input_ids are missing: this bridge was trained with a "
                                 "text after the prefix; its README.md shows how to give it")
            after = torch.tensor([self.config.after_ids], dtype=input_ids.dtype)
            decoder_input_ids = after.to(input_ids.device).expand(len(input_ids), -1)
        if decoder_attention_mask is None:
            decoder_attention_mask = torch.ones_like(decoder_input_ids)
        prefix, end = (x.to(table.weight.dtype) / self._scale(table)
                       for x in (prefix, end))
        start = table(torch.tensor(self.config.start_ids, dtype=torch.long, device=prefix.device))
        rows = []
        for i in range(len(prefix)):
            text = decoder_input_ids[i][decoder_attention_mask[i].bool()].to(prefix.device)
            rows.append(torch.cat([start, prefix[i][mask[i].bool()], end[None], table(text)]))
        longest = max(map(len, rows))
        embeds = torch.stack([functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
        real = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows],
                            device=embeds.device)
        return embeds, real

    def _scale(self, table):
        """What the LLM multiplies its inputs by, where its embedding table does not (Gemma 1 and 2
        in some releases)."""
        if self.decoder.config.model_type not in ("gemma", "gemma2") or hasattr(
                table, "embed_scale"):
            return 1.0
        scales = "normalizer" in inspect.getsource(type(self.decoder.get_decoder()).forward)
        width = torch.tensor(self.config.writer["width"] ** 0.5, dtype=table.weight.dtype)
        return width.item() if scales else 1.0

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None,
                decoder_attention_mask=None, labels=None, **kwargs):
        """Logits after the prefix and after each decoder token: [B 1+T V], decoder ids unpadded or
        padded on the left.

        Args:
          input_ids, attention_mask: of the encoder. decoder_*: text that follows the prefix.
          labels: [B 1+T] tokens wanted there, -100 where none is; gives a mean loss.
        """
        embeds, real = self.splice(input_ids, attention_mask, decoder_input_ids,
                                   decoder_attention_mask)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        logits = self.decoder(inputs_embeds=embeds, attention_mask=real, position_ids=positions,
                              use_cache=False).logits
        texts = 0 if decoder_input_ids is None else decoder_input_ids.shape[1]
        logits, loss = logits[:, -1 - texts :], None
        if labels is not None:
            loss = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, decoder_input_ids=None,
                 decoder_attention_mask=None, **kwargs):
        """The LLM's `generate`; returns the new tokens alone.

        Greedy, and free of what the LLM's own `generation_config.json` asks for, unless arguments
        say otherwise.
        """
        embeds, real = self.splice(input_ids, attention_mask, decoder_input_ids,
                                   decoder_attention_mask)
        if "generation_config" not in kwargs:
            kwargs["generation_config"] = GenerationConfig(
                eos_token_id=self.config.eos_token_id, pad_token_id=self.config.eos_token_id,
                bos_token_id=self.config.bos_token_id,
            )
        # What is not set there would be filled in from the LLM's own.
        own, self.decoder.generation_config = (
            self.decoder.generation_config, kwargs["generation_config"])
        try:
            return self.decoder.generate(inputs_embeds=embeds, attention_mask=real, **kwargs)
        finally:
            self.decoder.generation_config = own
