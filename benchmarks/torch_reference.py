"""The papers' pipeline in plain PyTorch, written as by its authors, for tests and benchmarks.

The fusion runs a full transformer layer over every token's layers, the batch is padded to its
longest row, and logits are computed over the full vocabulary at every position.
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaForCausalLM, MT5EncoderModel


class GlobalSoftmax(nn.Module):
    """`softmax(τ·w)` over layers."""

    def __init__(self, num_layers: int):
        super().__init__()
        self.w = nn.Parameter(torch.full((num_layers,), 3e-5))
        self.t = nn.Parameter(torch.tensor(1e-5))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """States [B S L D] -> features [B S D]."""
        weights = torch.softmax((100.0 + 1e5 * self.t) * self.w, dim=0)
        return torch.einsum("l,bsld->bsd", weights, states)


class TransformerSoftmax(nn.Module):
    """One `nn.TransformerEncoderLayer` over `[cls, h_1 + p_1, …, h_L + p_L]` of every token."""

    def __init__(self, num_layers: int, d_model: int, d_ff: int = 2048, dropout: float = 0.1):
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(d_model))
        self.positions = nn.Parameter(torch.randn(num_layers, d_model))
        self.layer = nn.TransformerEncoderLayer(d_model, 1, d_ff, dropout, batch_first=True)
        self.weigh = nn.Linear(d_model, num_layers)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """States [B S L D] -> features [B S D]."""
        batch, length, _, width = states.shape
        tokens = (states + self.positions).flatten(0, 1)
        x = torch.cat([self.cls.expand(len(tokens), 1, width), tokens], dim=1)
        weights = torch.softmax(self.weigh(self.layer(x)[:, 0]), dim=-1)
        weights = weights.view(batch, length, -1)
        return torch.einsum("bsl,bsld->bsd", weights, states)


class TorchBridge(nn.Module):
    """Frozen mT5 encoder, fusion, linear projector and end vector, frozen Llama."""

    def __init__(self, encoder: MT5EncoderModel, llm: LlamaForCausalLM, fusion: nn.Module | None):
        super().__init__()
        d_in, d_out = encoder.config.d_model, llm.config.hidden_size
        self.encoder, self.llm = encoder.requires_grad_(False), llm.requires_grad_(False)
        self.fusion, self.projector = fusion, nn.Linear(d_in, d_out)
        self.end = nn.Parameter(torch.zeros(d_out))

    def features(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Fused features [B S D]; padding gets 0."""
        with torch.no_grad():
            out = self.encoder(
                input_ids=tokens, attention_mask=mask, output_hidden_states=self.fusion is not None
            )
        if self.fusion is None:
            return out.last_hidden_state
        states = torch.stack(out.hidden_states[1:], dim=2)
        return self.fusion(states) * mask[:, :, None]

    def forward(self, queries: list[list[int]], targets: list[list[int]], bos: int):
        """Mean cross-entropy of the target tokens."""
        tokens, mask = _pad(queries)
        prefixes = self.projector(self.features(tokens, mask))
        embed = self.llm.get_input_embeddings()
        rows, labels = [], []
        for prefix, query, target in zip(prefixes, queries, targets, strict=True):
            ids = torch.tensor(target)
            rows.append(torch.cat([
                embed(torch.tensor([bos])), prefix[: len(query)], self.end[None], embed(ids),
            ]))
            labels.append(torch.cat([torch.full((len(query) + 2,), -100), ids]))
        lengths = torch.tensor([len(row) for row in rows])
        attend = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        logits = self.llm(
            inputs_embeds=nn.utils.rnn.pad_sequence(rows, batch_first=True), attention_mask=attend
        ).logits
        padded = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        return nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), padded[:, 1:].flatten(), ignore_index=-100
        )


def _pad(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return tokens, mask


def copy_params(params: dict[str, Any], *, fusion: nn.Module | None = None,
                bridge: TorchBridge | None = None) -> None:
    """Copies our fusion (and projector) parameters into the PyTorch modules.

    Args:
      params: `{'fusion': …, 'projector': …}`, nested, arrays.
    """
    ours = params.get("fusion", {})
    if isinstance(fusion, GlobalSoftmax):
        _set(fusion.w, ours["w"])
        _set(fusion.t, ours["t"])
    elif isinstance(fusion, TransformerSoftmax):
        layer, attention = fusion.layer, fusion.layer.self_attn
        _set(fusion.cls, ours["cls"])
        _set(fusion.positions, ours["positions"])
        _set(attention.in_proj_weight, np.concatenate([ours[f"{x}_kernel"].T for x in "qkv"]))
        _set(attention.in_proj_bias, np.concatenate([ours[f"{x}_bias"] for x in "qkv"]))
        _set(attention.out_proj.weight, ours["o_kernel"].T)
        _set(attention.out_proj.bias, ours["o_bias"])
        for theirs, name in ((layer.linear1, "up"), (layer.linear2, "down"),
                             (fusion.weigh, "weigh")):
            _set(theirs.weight, ours[name]["kernel"].T)
            _set(theirs.bias, ours[name]["bias"])
        for theirs, name in ((layer.norm1, "attn_norm"), (layer.norm2, "mlp_norm")):
            _set(theirs.weight, ours[name]["scale"])
            _set(theirs.bias, ours[name]["bias"])
    if bridge is not None:
        _set(bridge.projector.weight, params["projector"]["out"]["kernel"].T)
        _set(bridge.projector.bias, params["projector"]["out"]["bias"])
        _set(bridge.end, params["projector"]["end"])


@torch.no_grad()
def _set(parameter: nn.Parameter, value: Any) -> None:
    parameter.copy_(torch.from_numpy(np.array(value)))
