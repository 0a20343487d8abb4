"""Shapes of well-known checkpoints, copied from their `config.json`, to compile programs without
the hub. When a checkpoint is loaded, its own file is used instead.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxfusion.errors import InputError
from jaxfusion.hf.decoders import decoder_config
from jaxfusion.hf.encoders import encoder_config
from jaxfusion.hf.hub import NOT_WEIGHTS, find_files
from jaxfusion.hf.load import read_config
from jaxfusion.nn.decoder import Decoder, DecoderConfig
from jaxfusion.nn.encoder import Encoder, EncoderConfig


def _mt5(d_model: int, d_ff: int, num_layers: int, num_heads: int) -> dict[str, Any]:
    return {"model_type": "mt5", "vocab_size": 250_112, "d_model": d_model, "d_ff": d_ff,
            "d_kv": 64, "num_layers": num_layers, "num_heads": num_heads,
            "feed_forward_proj": "gated-gelu"}


def _xlm_r(hidden: int, layers: int, heads: int, rows: int = 250_002, **more: Any):
    return {"model_type": "xlm-roberta", "vocab_size": rows, "hidden_size": hidden,
            "intermediate_size": 4 * hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "max_position_embeddings": 514, "type_vocab_size": 1,
            "layer_norm_eps": 1e-5, "pad_token_id": 1, **more}


def _bert(hidden: int, layers: int, heads: int, rows: int) -> dict[str, Any]:
    return {"model_type": "bert", "vocab_size": rows, "hidden_size": hidden,
            "intermediate_size": 4 * hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "max_position_embeddings": 512}


def _m2m100(width: int, inner: int, layers: int, rows: int) -> dict[str, Any]:
    return {"model_type": "m2m_100", "vocab_size": rows, "d_model": width,
            "encoder_ffn_dim": inner, "encoder_layers": layers, "encoder_attention_heads": 16}


def _mmbert(hidden: int, heads: int) -> dict[str, Any]:
    return {"model_type": "modernbert", "vocab_size": 256_000, "hidden_size": hidden,
            "intermediate_size": 1152, "num_hidden_layers": 22, "num_attention_heads": heads,
            "local_rope_theta": 160_000.0}


def _llama(hidden: int, inner: int, layers: int, heads: int, kv: int, rows: int, **more: Any):
    return {"model_type": "llama", "vocab_size": rows, "hidden_size": hidden,
            "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv, "head_dim": hidden // heads, "rope_theta": 10_000.0,
            "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
            "max_position_embeddings": 4096, **more}


def _llama_3(*shape: int, factor: float | None = None, **more: Any) -> dict[str, Any]:
    scaling = None if factor is None else {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}
    length = 8192 if factor is None else 131_072
    return _llama(*shape, 128_256, rope_theta=500_000.0, rope_scaling=scaling,
                  max_position_embeddings=length, **more)


def _qwen(hidden: int, inner: int, layers: int, heads: int, kv: int) -> dict[str, Any]:
    """The smaller models of Qwen2.5, with tied embeddings."""
    return {"model_type": "qwen2", "vocab_size": 151_936, "hidden_size": hidden,
            "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True, "max_position_embeddings": 32_768}


XL, XXL = _mt5(2048, 5120, 24, 32), _mt5(4096, 10_240, 24, 64)
LLAMA_7B, LLAMA_13B = (4096, 11_008, 32, 32, 32), (5120, 13_824, 40, 40, 40)
BACKBONES: dict[str, dict[str, Any]] = {
    "google/mt5-small": _mt5(512, 1024, 8, 6), "google/mt5-base": _mt5(768, 2048, 12, 12),
    "google/mt5-large": _mt5(1024, 2816, 24, 16), "google/mt5-xl": XL, "google/mt5-xxl": XXL,
    "DKYoon/mt5-xl-lm-adapt": XL, "DKYoon/mt5-xxl-lm-adapt": XXL,
    "intfloat/multilingual-e5-small": _bert(384, 12, 12, 250_037),
    "intfloat/multilingual-e5-base": _xlm_r(768, 12, 12),
    "intfloat/multilingual-e5-large": _xlm_r(1024, 24, 16),
    "FacebookAI/xlm-roberta-base": _xlm_r(768, 12, 12),
    "FacebookAI/xlm-roberta-large": _xlm_r(1024, 24, 16),
    "BAAI/bge-m3": _xlm_r(1024, 24, 16, max_position_embeddings=8194),
    "cis-lmu/glot500-base": _xlm_r(768, 12, 12, 401_145),
    "google-bert/bert-base-multilingual-cased": _bert(768, 12, 12, 119_547),
    "sentence-transformers/LaBSE": _bert(768, 12, 12, 501_153),
    "google/muril-base-cased": _bert(768, 12, 12, 197_285),
    "facebook/nllb-200-distilled-600M": _m2m100(1024, 4096, 12, 256_206),
    "facebook/nllb-200-distilled-1.3B": _m2m100(1024, 8192, 24, 256_206),
    "facebook/nllb-200-3.3B": _m2m100(2048, 8192, 24, 256_206),
    "facebook/m2m100_418M": _m2m100(1024, 4096, 12, 128_112),
    "jhu-clsp/mmBERT-small": _mmbert(384, 6), "jhu-clsp/mmBERT-base": _mmbert(768, 12),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _llama(
        576, 1536, 30, 9, 3, 49_152, rope_theta=100_000.0, tie_word_embeddings=True,
        max_position_embeddings=8192),
    "meta-llama/Llama-2-7b-hf": _llama(*LLAMA_7B, 32_000),
    "meta-llama/Llama-2-13b-hf": _llama(*LLAMA_13B, 32_000),
    "meta-math/MetaMath-7B-V1.0": _llama(*LLAMA_7B, 32_001),
    "microsoft/Orca-2-7b": _llama(*LLAMA_7B, 32_003),
    "meta-llama/Meta-Llama-3-8B-Instruct": _llama_3(4096, 14_336, 32, 32, 8),
    "meta-llama/Llama-3.1-8B-Instruct": _llama_3(4096, 14_336, 32, 32, 8, factor=8.0),
    "meta-llama/Llama-3.2-1B-Instruct": _llama_3(2048, 8192, 16, 32, 8, factor=32.0,
                                                 tie_word_embeddings=True),
    "meta-llama/Llama-3.2-3B-Instruct": _llama_3(3072, 8192, 28, 24, 8, factor=32.0,
                                                 tie_word_embeddings=True),
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen(896, 4864, 24, 14, 2),
    "Qwen/Qwen2.5-1.5B-Instruct": _qwen(1536, 8960, 28, 12, 2),
    "Qwen/Qwen2.5-3B-Instruct": _qwen(2048, 11_008, 36, 16, 2),
    "Qwen/Qwen2.5-7B-Instruct": {
        "model_type": "qwen2", "vocab_size": 152_064, "hidden_size": 3584,
        "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "max_position_embeddings": 32_768},
    # Without the RoPE factors for long contexts, which do not affect shapes.
    "microsoft/Phi-3.5-mini-instruct": {
        **_llama(3072, 8192, 32, 32, 32, 32_064), "model_type": "phi3", "pad_token_id": 32_000},
}


def backbone_shape(
    role: str, checkpoint: str, revision: str | None = None
) -> EncoderConfig | DecoderConfig:
    """A tower's shape, from the table above or from its `config.json`.

    Raises:
      InputError: neither exists.
    """
    json = BACKBONES.get(checkpoint)
    if json is None:
        try:
            json = read_config(find_files(checkpoint, NOT_WEIGHTS, revision))
        except InputError as error:
            raise InputError(f"{error}; built-in shapes: {', '.join(BACKBONES)}") from None
    read = encoder_config if role == "encoder" else decoder_config
    return read(json, checkpoint)


def backbone_size(role: str, checkpoint: str) -> int:
    """The number of a tower's parameters.

    Raises:
      InputError: as in `backbone_shape`.
    """
    shape, tokens = backbone_shape(role, checkpoint), jnp.zeros((1, 2), jnp.int32)

    def init():
        if role == "encoder":
            return Encoder(shape).init(jax.random.key(0), tokens, tokens == 0)
        return Decoder(shape).init(jax.random.key(0), tokens, tokens, tokens, method="score")

    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(init)))
