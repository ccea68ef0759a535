"""How each family of checkpoints names and packs its weights, and which part of each tensor a rank needs.

A Layout is a list of rules. A rule says what a tensor is (its `part`), and where our model keeps it. What a rank
owns of a part is ShardPlan's to say. A tensor that no rule names is an error: shapes never decide.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tp_attention.sharding import Range, ShardPlan

WHOLE, IGNORED = "whole", "ignored"


@dataclass(frozen=True)
class Rule:
    """Checkpoint tensors whose whole name matches `pattern` are `part` of the parameter `target`.

    part: q, k, v, out, gate, up, down, vocab, head, "whole" (each rank holds all of it) or "ignored".
    target: name of our parameter, with the pattern's groups as in re.sub; "" keeps the checkpoint's name.
    """

    pattern: str
    part: str
    target: str = ""


@dataclass(frozen=True)
class Placement:
    """Copy source[start:stop] along `dim` (None: all of it) to the parameter `target`, there from row `row` on.

    size: what the whole source tensor must measure along `dim`.
    """

    target: str
    dim: int | None = None
    source: Range = (0, 0)
    size: int = 0
    row: int = 0


@dataclass(frozen=True)
class Layout:
    """One family's rules; the first that matches a name wins."""

    name: str
    rules: tuple[Rule, ...]

    def place(self, tensor: str, plan: ShardPlan, rank: int) -> Placement | None:
        """What `rank` needs of the checkpoint's `tensor` and where it goes; None for a tensor that models ignore.

        Raises ValueError for a name that no rule knows.
        """
        for rule in self.rules:
            if match := re.fullmatch(rule.pattern, tensor):
                target = match.expand(rule.target) if rule.target else tensor
                return _placement(rule.part, target, plan, rank)
        raise ValueError(
            f"layout {self.name!r} does not know the tensor {tensor!r}; it would be lost, so it is refused"
        )


def _placement(part: str, target: str, plan: ShardPlan, rank: int) -> Placement | None:
    if part == IGNORED or (part == "head" and plan.vocab_matrices == 1):  # a tied head is the embedding once more
        return None
    if part == WHOLE:
        return Placement(target)
    q, kv, mlp, vocab = plan.q_rows(rank), plan.kv_rows(rank), plan.mlp_columns(rank), plan.vocab_rows(rank)
    q_size, kv_size = plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim
    local_q, local_kv = q[1] - q[0], kv[1] - kv[0]
    local_gate = mlp[1] - mlp[0] if plan.mlp_in_matrices == 2 else 0
    return {
        "q": Placement(target, 0, q, q_size),
        "k": Placement(target, 0, kv, kv_size, local_q),
        "v": Placement(target, 0, kv, kv_size, local_q + local_kv),
        "out": Placement(target, 1, q, q_size),
        "gate": Placement(target, 0, mlp, plan.intermediate_size),
        "up": Placement(target, 0, mlp, plan.intermediate_size, local_gate),
        "down": Placement(target, 1, mlp, plan.intermediate_size),
        "vocab": Placement(target, 0, vocab, plan.vocab_size),
        "head": Placement(target, 0, vocab, plan.vocab_size),
    }[part]


def _parts(pattern: str, parts: dict[str, str], target: str) -> tuple[Rule, ...]:
    """One rule for each of several tensors packed into one parameter; `{}` in the pattern is the tensor's name."""
    return tuple(Rule(pattern.format(name), part, target) for name, part in parts.items())


LLAMA = Layout(
    "llama",
    (
        *_parts(r"(.+\.self_attn)\.{}_proj\.(weight|bias)", {"q": "q", "k": "k", "v": "v"}, r"\1.attention.qkv_\2"),
        Rule(r"(.+\.self_attn)\.o_proj\.weight", "out", r"\1.attention.out_weight"),
        Rule(r"(.+\.self_attn)\.o_proj\.bias", WHOLE, r"\1.attention.out_bias"),
        Rule(r"(.+\.self_attn)\.([qk])_norm\.weight", WHOLE, r"\1.attention.\2_norm_weight"),
        *_parts(r"(.+\.mlp)\.{}_proj\.(weight|bias)", {"gate": "gate", "up": "up"}, r"\1.in_\2"),
        Rule(r"(.+\.mlp)\.down_proj\.weight", "down", r"\1.out_weight"),
        Rule(r"(.+\.mlp)\.down_proj\.bias", WHOLE, r"\1.out_bias"),
        Rule(r"model\.embed_tokens\.weight", "vocab"),
        Rule(r"lm_head\.weight", "head"),
        Rule(r"model\.norm\.weight|.+\.(input|post_attention)_layernorm\.weight", WHOLE),
        Rule(r".*rotary_emb\.inv_freq", IGNORED),  # old files carry it; RoPE is computed from the config
    ),
)

# BERT's files come with and without the prefix "bert.", and with gamma/beta for LayerNorm in the oldest.
BERT = Layout(
    "bert",
    (
        *_parts(
            r"(?:bert\.)?(encoder\..+\.attention)\.self\.{}\.(weight|bias)",
            {"query": "q", "key": "k", "value": "v"},
            r"\1.attention.qkv_\2",
        ),
        Rule(r"(?:bert\.)?(encoder\..+\.attention)\.output\.dense\.weight", "out", r"\1.attention.out_weight"),
        Rule(r"(?:bert\.)?(encoder\..+\.attention)\.output\.dense\.bias", WHOLE, r"\1.attention.out_bias"),
        Rule(r"(?:bert\.)?(encoder\..+\.attention)\.output\.LayerNorm\.(?:weight|gamma)", WHOLE, r"\1.norm.weight"),
        Rule(r"(?:bert\.)?(encoder\..+\.attention)\.output\.LayerNorm\.(?:bias|beta)", WHOLE, r"\1.norm.bias"),
        Rule(r"(?:bert\.)?(encoder\.layer\.\d+)\.intermediate\.dense\.(weight|bias)", "up", r"\1.output.mlp.in_\2"),
        Rule(r"(?:bert\.)?(encoder\.layer\.\d+)\.output\.dense\.weight", "down", r"\1.output.mlp.out_weight"),
        Rule(r"(?:bert\.)?(encoder\.layer\.\d+)\.output\.dense\.bias", WHOLE, r"\1.output.mlp.out_bias"),
        Rule(r"(?:bert\.)?(encoder\.layer\.\d+\.output)\.LayerNorm\.(?:weight|gamma)", WHOLE, r"\1.norm.weight"),
        Rule(r"(?:bert\.)?(encoder\.layer\.\d+\.output)\.LayerNorm\.(?:bias|beta)", WHOLE, r"\1.norm.bias"),
        Rule(r"(?:bert\.)?(embeddings\.word_embeddings\.weight)", "vocab", r"\1"),
        Rule(r"(?:bert\.)?(embeddings\.(?:position|token_type)_embeddings\.weight)", WHOLE, r"\1"),
        Rule(r"(?:bert\.)?(embeddings\.LayerNorm)\.(?:weight|gamma)", WHOLE, r"\1.weight"),
        Rule(r"(?:bert\.)?(embeddings\.LayerNorm)\.(?:bias|beta)", WHOLE, r"\1.bias"),
        # The heads of other tasks, and a buffer of old files: the encoder's states do not depend on them.
        Rule(r"(?:bert\.)?(embeddings\.position_ids|pooler\..+)|cls\..+|classifier\..+|qa_outputs\..+", IGNORED),
    ),
)
