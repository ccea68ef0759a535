"""AttentionConfig: what one attention layer is, before anybody thinks about ranks.

Frozen and validated on construction. What a rank holds is asked of ShardPlan, never written back here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

NORMS = ("rmsnorm", "layernorm")
ROPE_SCALINGS = ("linear", "dynamic", "yarn", "llama3", "longrope")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE frequencies are stretched past the trained context; field names follow Hugging Face's `rope_scaling`.

    kind: "linear" (position interpolation), "dynamic" (NTK-aware, grows with the sequence), "yarn" (arXiv 2309.00071),
    "llama3" (Llama 3.1), "longrope" (arXiv 2402.13753).
    original_max_positions: the context length the model was trained with, in tokens; needed by all but "linear".
    attention_factor: multiplies cos and sin; None takes the value the method's paper suggests.
    """

    kind: str
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _one_of("RoPE scaling", self.kind, ROPE_SCALINGS)
        if self.factor < 1.0:
            raise ValueError(f"RoPE scaling factor={self.factor} shrinks the context; use factor >= 1")
        if self.kind != "linear" and self.original_max_positions < 1:
            raise ValueError(
                f"RoPE scaling {self.kind!r} needs original_max_positions >= 1, got {self.original_max_positions}"
            )
        if self.kind == "longrope" and len(self.short_factor) != len(self.long_factor):
            raise ValueError(
                f"longrope has {len(self.short_factor)} short and {len(self.long_factor)} long factors; give one each"
            )


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of the first `dim` elements of each q and k head (None: the whole head).

    interleaved: pairs are (0, 1), (2, 3), … as in GPT-J; otherwise (i, i + dim/2) as in Llama and NeoX.
    """

    theta: float = 10000.0
    dim: int | None = None
    interleaved: bool = False
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        if self.theta <= 0:
            raise ValueError(f"rope theta={self.theta} must be positive")
        if self.dim is not None and (self.dim < 2 or self.dim % 2):
            raise ValueError(f"rope dim={self.dim} must be even and at least 2")


@dataclass(frozen=True)
class AttentionConfig:
    """One self-attention layer, all head counts global.

    hidden_size: E. heads: Hq. kv_heads: Hkv, None = heads. head_dim: D, None = hidden_size / heads; need not be that.
    causal: query i sees keys up to its own position. window: (left, right) keys around it, None or -1 unbounded.
    norm: the block's norm, fused into the QKV projection; None means that x arrives normed. norm_eps: its epsilon.
    qk_norm: norm of each q and k head before RoPE, with weights [D]. sinks: one learned logit per query head.
    alibi: the standard slopes for `heads` heads. scale: None = 1/sqrt(D). softcap: c in c·tanh(s/c).
    """

    hidden_size: int
    heads: int
    kv_heads: int = None  # type: ignore[assignment]  # filled in on construction, so an int ever after
    head_dim: int = None  # type: ignore[assignment]
    causal: bool = True
    norm: str | None = None
    norm_eps: float = 1e-5
    qk_norm: str | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    rope: RopeConfig | None = None
    alibi: bool = False
    sinks: bool = False
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    scale: float | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("hidden_size", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.head_dim is None:
            if self.hidden_size % self.heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is no multiple of heads={self.heads}; pass head_dim explicitly"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.heads)
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is no multiple of kv_heads={self.kv_heads}; use a divisor of heads")
        if self.head_dim < 1:
            raise ValueError(f"head_dim={self.head_dim} must be at least 1")
        for name in ("norm", "qk_norm"):
            if getattr(self, name) is not None:
                _one_of(name, getattr(self, name), NORMS)
        if self.norm_eps < 0:
            raise ValueError(f"norm_eps={self.norm_eps} must not be negative")
        if self.rope is not None and self.rope.dim is not None and self.rope.dim > self.head_dim:
            raise ValueError(f"rope dim={self.rope.dim} exceeds head_dim={self.head_dim}; use dim <= head_dim")
        if self.rope is not None and self.rope.dim is None and self.head_dim % 2:
            raise ValueError(f"RoPE turns pairs, head_dim={self.head_dim} is odd; set an even rope dim")
        if self.window is not None:
            if len(self.window) != 2 or any(side is not None and side < -1 for side in self.window):
                raise ValueError(f"window={self.window} must be (left, right), each >= 0, or None or -1 for unbounded")
            object.__setattr__(self, "window", tuple(self.window))
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap={self.softcap} must be positive; None turns it off")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype} is not supported; use one of {', '.join(map(str, DTYPES))}")


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}; known: {', '.join(known)}")
