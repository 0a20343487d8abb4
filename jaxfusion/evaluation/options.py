"""Possible answers of a batch as trees of tokens, so that shared beginnings are read once."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxfusion.data.batching import round_length


@dataclass(frozen=True)
class Options:
    """C possible answers for each of B rows. The LLM reads every token that another follows, once
    for all answers of the row that begin alike: K nodes of a tree below the prompt.

    Attributes:
      tokens: [C B T] ids of the answers. mask: [C B T] True at real ids.
      after: [C B T] the node that predicts each id; -1 is the prompt.
      nodes: [B K] ids that are read. depth: [B K] their distance from the prompt, from 0.
      visible: [B K K] the nodes that each node sees: itself and those above it. Padding sees no
        node, and no node sees it.
    """

    tokens: Int[Array, "C B T"]
    mask: Bool[Array, "C B T"]
    after: Int[Array, "C B T"]
    nodes: Int[Array, "B K"]
    depth: Int[Array, "B K"]
    visible: Bool[Array, "B K K"]


jax.tree_util.register_dataclass(
    Options, data_fields=[x.name for x in fields(Options)], meta_fields=[]
)


def make_options(ids: Sequence[Sequence[Sequence[int]]], batch_size: int) -> Options:
    """The options of a batch from ids by option and row, padded to few shapes.

    Args:
      ids: of C options for each row; an empty one has log-likelihood 0.
      batch_size: B; rows beyond those given have no options.
    """
    trees: dict[tuple, Tree] = {}
    rows = [tuple(map(tuple, row)) for row in zip(*ids, strict=True)]
    for row in rows:
        if row not in trees:
            trees[row] = Tree(row)
    longest = max((len(option) for row in trees for option in row), default=0)
    most = max((len(tree.nodes) for tree in trees.values()), default=0)
    # One token needs only the prompt's last logits: no nodes.
    # Lengths of answers cost little, so that few of them do; nodes are read by the LLM.
    by_id = (len(ids), batch_size, 1 << max(longest - 1, 0).bit_length() if longest else 0)
    nodes = (batch_size, round_length(most) if most else 0)
    padded = Options(
        np.zeros(by_id, np.int32), np.zeros(by_id, bool), np.full(by_id, -1, np.int32),
        np.zeros(nodes, np.int32), np.zeros(nodes, np.int32), np.zeros((*nodes, nodes[1]), bool),
    )
    for b, row in enumerate(rows):
        tree = trees[row]
        n = len(tree.nodes)
        padded.nodes[b, :n], padded.depth[b, :n] = tree.nodes, tree.depth
        padded.visible[b, :n, :n] = tree.visible
        for c, option in enumerate(row):
            padded.tokens[c, b, : len(option)] = option
            padded.mask[c, b, : len(option)] = True
            padded.after[c, b, : len(option)] = tree.after[c]
    return padded


class Tree:
    """The nodes of one row: see `Options`."""

    def __init__(self, options: Sequence[Sequence[int]]):
        numbers: dict[tuple[int, int], int] = {}  # (node above, id) -> node
        self.nodes, self.depth, self.after, above = [], [], [], []
        for option in options:
            node, after = -1, []
            for depth, token in enumerate(option):
                after.append(node)
                if depth == len(option) - 1:
                    break  # nothing follows: it need not be read
                if (node, token) not in numbers:
                    numbers[node, token] = len(self.nodes)
                    self.nodes.append(token)
                    self.depth.append(depth)
                    above.append(node)
                node = numbers[node, token]
            self.after.append(after)
        self.visible = np.eye(len(self.nodes), dtype=bool)
        for node, parent in enumerate(above):
            if parent >= 0:
                self.visible[node] |= self.visible[parent]
