"""Llama and what keeps its block: RMSNorm, a gated MLP, and q, k, v apart or one after another."""

from __future__ import annotations

from tp_attention.checkpoint.families.build import Rules, column, embedding, head, per_layer, row, split_qkv, whole
from tp_attention.checkpoint.layouts import Layout, Rule

INV_FREQ = r".*rotary_(pos_)?emb\.(inv_freq|(cos|sin)_cached)"  # old files carry it; RoPE is computed from the config

_NORMS: Rules = (*whole("input_layernorm", "attention_norm"), *whole("post_attention_layernorm", "mlp_norm"))
_QK_NORMS: Rules = (
    Rule("self_attn.q_norm.weight", "attention.q_norm_weight"),
    Rule("self_attn.k_norm.weight", "attention.k_norm_weight"),
)
_QKV = split_qkv("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OUT = row("self_attn.o_proj", "attention.out", "out")
_DOWN = row("mlp.down_proj", "mlp.out", "down")
_MLP: Rules = (*column("mlp.gate_proj", "mlp.in", "gate"), *column("mlp.up_proj", "mlp.in", "up"), *_DOWN)


def _llama(name: str, *groups: Rules) -> Layout:
    model = (*embedding("[model.]embed_tokens"), *whole("[model.]norm", "norm"), *head())
    return Layout(name, (*model, *per_layer("[model.]layers.", *groups)), extra=(INV_FREQ,))


# Llama, Mistral, Qwen2, Qwen3 and the first Gemma.
LLAMA = _llama("llama", _NORMS, _QKV, _QK_NORMS, _OUT, _MLP)

GEMMA2 = _llama(  # Gemma 2 and 3: a norm before each half of the block and another after it
    "gemma2",
    whole("input_layernorm", "attention_norm"),
    whole("post_attention_layernorm", "attention_post_norm"),
    whole("pre_feedforward_layernorm", "mlp_norm"),
    whole("post_feedforward_layernorm", "mlp_post_norm"),
    _QKV,
    _QK_NORMS,
    _OUT,
    _MLP,
)

PHI3 = _llama(
    "phi3",
    _NORMS,
    column("self_attn.qkv_proj", "attention.qkv", "q", "k", "v"),
    _OUT,
    column("mlp.gate_up_proj", "mlp.in", "gate", "up"),
    _DOWN,
)

BAICHUAN = _llama("baichuan", _NORMS, column("self_attn.W_pack", "attention.qkv", "q", "k", "v"), _OUT, _MLP)

_FEED_FORWARD: Rules = (  # Meta's names of the MLP
    *column("feed_forward.w1", "mlp.in", "gate"),
    *column("feed_forward.w3", "mlp.in", "up"),
    *row("feed_forward.w2", "mlp.out", "down"),
)

# Meta's own files, uncut: consolidated.00.pth where it is the only one. RoPE there turns neighbouring rows.
LLAMA_META = Layout(
    "llama-meta",
    (
        *embedding("tok_embeddings"),
        *whole("norm", "norm"),
        *head("output"),
        *per_layer(
            "layers.",
            whole("attention_norm", "attention_norm"),
            split_qkv("attention.wq", "attention.wk", "attention.wv", rope_pairs=True),
            row("attention.wo", "attention.out", "out"),
            whole("ffn_norm", "mlp_norm"),
            _FEED_FORWARD,
        ),
    ),
    extra=(r"rope\.freqs",),
)

LLAMA_GGUF = Layout(
    "llama-gguf",
    (
        *embedding("token_embd"),
        *whole("output_norm", "norm"),
        *head("output"),
        *per_layer(
            "blk.",
            whole("attn_norm", "attention_norm"),
            split_qkv("attn_q", "attn_k", "attn_v", rope_pairs=True),
            row("attn_output", "attention.out", "out"),
            whole("ffn_norm", "mlp_norm"),
            column("ffn_gate", "mlp.in", "gate"),
            column("ffn_up", "mlp.in", "up"),
            row("ffn_down", "mlp.out", "down"),
        ),
    ),
    extra=(r"rope_freqs\.weight",),
)

INTERNLM2 = Layout(
    "internlm2",
    (
        *embedding("[model.]tok_embeddings"),
        *whole("[model.]norm", "norm"),
        *head("output"),
        *per_layer(
            "[model.]layers.",
            whole("attention_norm", "attention_norm"),
            column("attention.wqkv", "attention.qkv", "q", "k", "v", order="groups"),
            row("attention.wo", "attention.out", "out"),
            whole("ffn_norm", "mlp_norm"),
            _FEED_FORWARD,
        ),
    ),
    extra=(INV_FREQ,),
)

QWEN1 = Layout(
    "qwen-1",
    (
        *embedding("[transformer.]wte"),
        *whole("[transformer.]ln_f", "norm"),
        *head(),
        *per_layer(
            "[transformer.]h.",
            whole("ln_1", "attention_norm"),
            column("attn.c_attn", "attention.qkv", "q", "k", "v"),
            row("attn.c_proj", "attention.out", "out"),
            whole("ln_2", "mlp_norm"),
            column("mlp.w2", "mlp.in", "gate"),  # w1(x) · silu(w2(x))
            column("mlp.w1", "mlp.in", "up"),
            row("mlp.c_proj", "mlp.out", "down"),
        ),
    ),
    extra=(INV_FREQ,),
)

CHATGLM2 = Layout(  # ChatGLM2, ChatGLM3 and GLM-4
    "chatglm2",
    (
        *embedding("[transformer.]embedding.word_embeddings"),
        *whole("[transformer.]encoder.final_layernorm", "norm"),
        *head("[transformer.]output_layer"),
        *per_layer(
            "[transformer.]encoder.layers.",
            _NORMS,
            column("self_attention.query_key_value", "attention.qkv", "q", "k", "v"),
            row("self_attention.dense", "attention.out", "out"),
            column("mlp.dense_h_to_4h", "mlp.in", "gate", "up"),
            row("mlp.dense_4h_to_h", "mlp.out", "down"),
        ),
    ),
    extra=(INV_FREQ, r"(transformer\.)?prefix_encoder\..+"),
)

DBRX = Layout(
    "dbrx",
    (
        *embedding("[transformer.]wte"),
        *whole("[transformer.]norm_f", "norm"),
        *head(),
        *per_layer(
            "[transformer.]blocks.",
            whole("norm_attn_norm.norm_1", "attention_norm"),
            column("norm_attn_norm.attn.Wqkv", "attention.qkv", "q", "k", "v"),
            row("norm_attn_norm.attn.out_proj", "attention.out", "out"),
            whole("norm_attn_norm.norm_2", "mlp_norm"),
        ),
    ),
    # The experts stay whole on every rank: their matrices lie one after another in one, each to be cut by itself.
    extra=(INV_FREQ, r"(transformer\.)?blocks\.\d+\.ffn\.(router\.layer\.weight|experts\.mlp\.(w1|v1|w2))"),
)
