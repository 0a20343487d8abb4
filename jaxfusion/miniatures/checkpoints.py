"""Writes small checkpoints with random weights in Hugging Face format, for tests and first steps.

    python -m jaxfusion.miniatures.checkpoints OUT --size tiny

writes OUT/encoder (mT5) and OUT/decoder (Llama). Weights are scaled so that logits spread over
several units (matrices at 1/sqrt(fan_in), head at 3/sqrt(d_model)).
"""

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxfusion.errors import InputError
from jaxfusion.files import new_directory
from jaxfusion.hf.save import write_tower
from jaxfusion.miniatures.text import made_up_tokenizer
from jaxfusion.nn.decoder import Decoder, DecoderConfig
from jaxfusion.nn.encoder import Encoder, EncoderConfig
from jaxfusion.nn.rope import Llama3Scaling, Rope

LLAMA32_ROPE = Rope(500_000.0, Llama3Scaling(32.0, 1.0, 4.0, 8192))

# Vocabulary sizes are set from the tokenizers, with some spare rows.
SIZES: dict[str, tuple[EncoderConfig, DecoderConfig]] = {
    "tiny": (
        EncoderConfig(0, d_model=64, d_ff=128, num_layers=4, num_heads=4, head_dim=16),
        DecoderConfig(0, 64, 128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
                      tie_embeddings=True, rope=LLAMA32_ROPE),
    ),
    "pocket": (
        EncoderConfig(0, d_model=128, d_ff=256, num_layers=6, num_heads=4, head_dim=32),
        DecoderConfig(0, 128, 384, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=32),
    ),
    # google/mt5-small, and a Llama of 100 million parameters.
    "small": (
        EncoderConfig(0, d_model=512, d_ff=1024, num_layers=8, num_heads=6, head_dim=64),
        DecoderConfig(0, 768, 2048, num_layers=10, num_heads=12, num_kv_heads=4, head_dim=64,
                      rope=LLAMA32_ROPE),
    ),
}


def random_params(config: EncoderConfig | DecoderConfig, seed: int) -> dict[str, Any]:
    """Random parameters of a tower, unboxed, float32."""
    tokens = jnp.zeros((1, 2), jnp.int32)

    def init(key):
        if isinstance(config, EncoderConfig):
            return Encoder(config).init(key, tokens, tokens == 0)
        return Decoder(config).init(key, tokens, tokens, tokens, method="score")

    return nn.unbox(jax.jit(init)(jax.random.key(seed))["params"])


def write_random_tower(out: Path, config: EncoderConfig | DecoderConfig, *, seed: int = 0) -> None:
    """Writes the config and random weights of one tower into an existing directory."""
    write_tower(out, config, random_params(config, seed))


def write_checkpoints(
    out: Path, size: str, *, seed: int = 0,
    encoder_tokenizer: Path | None = None, decoder_tokenizer: Path | None = None,
) -> None:
    """Writes OUT/encoder and OUT/decoder with tokenizers.

    Args:
      size: a name in `SIZES`.
      encoder_tokenizer, decoder_tokenizer: SentencePiece models; None trains small byte-level
        tokenizers on made-up text.
    """
    with new_directory(out) as partial:
        for role, config, spm, name in (
            ("encoder", SIZES[size][0], encoder_tokenizer, "spiece.model"),
            ("decoder", SIZES[size][1], decoder_tokenizer, "tokenizer.model"),
        ):
            path = partial / role
            path.mkdir()
            if spm is not None:
                shutil.copyfile(spm, path / name)
                family = {"model_type": "mt5" if role == "encoder" else "llama"}
                (path / "config.json").write_text(json.dumps(family), "utf-8")
            else:
                made_up_tokenizer(role).save_pretrained(path)
            vocab = _tokenizer_size(path)
            write_random_tower(path, replace(config, vocab_size=(vocab // 32 + 1) * 32), seed=seed)


def _tokenizer_size(path: Path) -> int:
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(path))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encoder_tokenizer", type=Path, help="a SentencePiece model")
    parser.add_argument("--decoder_tokenizer", type=Path, help="a SentencePiece model")
    args = parser.parse_args()
    try:
        write_checkpoints(
            args.out, args.size, seed=args.seed,
            encoder_tokenizer=args.encoder_tokenizer, decoder_tokenizer=args.decoder_tokenizer,
        )
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    for role in ("encoder", "decoder"):
        names = sorted(file.name for file in (args.out / role).iterdir())
        print(f"{args.out / role}: {', '.join(names)}")


if __name__ == "__main__":
    main()
