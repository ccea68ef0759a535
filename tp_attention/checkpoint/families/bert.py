"""BERT: separate query, key and value, norms after the residual additions."""

from __future__ import annotations

from tp_attention.checkpoint.families.build import Rules, column, embedding, per_layer, row, split_qkv, whole
from tp_attention.checkpoint.layouts import Layout, Rule


def _norm(name: str, native: str) -> Rules:
    """A LayerNorm; the oldest files call its weight gamma and its bias beta."""
    old = (("gamma", "weight"), ("beta", "bias"))
    aliases = (Rule(f"{name}.{theirs}", f"{native}.{ours}", alias=True) for theirs, ours in old)
    return *whole(name, native), *aliases


BERT = Layout(
    "bert",
    (
        *embedding("[bert.]embeddings.word_embeddings"),
        Rule("[bert.]embeddings.position_embeddings.weight", "position_embedding.weight"),
        Rule("[bert.]embeddings.token_type_embeddings.weight", "token_type_embedding.weight"),
        *_norm("[bert.]embeddings.LayerNorm", "embedding_norm"),
        *per_layer(
            "[bert.]encoder.layer.",
            split_qkv("attention.self.query", "attention.self.key", "attention.self.value"),
            row("attention.output.dense", "attention.out", "out"),
            _norm("attention.output.LayerNorm", "attention_norm"),
            column("intermediate.dense", "mlp.in", "up"),
            row("output.dense", "mlp.out", "down"),
            _norm("output.LayerNorm", "mlp_norm"),
        ),
    ),
    # The heads of other tasks, and a buffer of old files: the encoder's states do not depend on them.
    extra=(r"(bert\.)?(embeddings\.position_ids|pooler\..+)", r"cls\..+", r"classifier\..+", r"qa_outputs\..+"),
)
