"""The two target models in PyTorch, computing as mlx-lm's qwen3_5 and qwen3 do."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

BITS, GROUP = 4, 64
KINDS = {
    "hybrid": {
        "hidden": 384, "inter": 1024, "layers": 12, "heads": 6, "kv": 2, "head_dim": 64,
        "key_heads": 3, "value_heads": 6, "dim": 64, "interval": 4, "rope_part": 0.25,
    },
    "attention": {
        "hidden": 256, "inter": 768, "layers": 5, "heads": 4, "kv": 2, "head_dim": 64,
        "interval": 1, "rope_part": 1.0,
    },
}  # fmt: skip
VOCABULARY, THETA, EPS = 8192, 100_000.0, 1e-6


def codes_of(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """4-bit codes, scales and biases of a matrix, as MLX's affine mode lays them out.

    Scales and biases are rounded to bfloat16 before the codes are made.
    """
    x = w.float().unflatten(-1, (-1, GROUP))
    low, high = x.amin(-1), x.amax(-1)
    top = 2**BITS - 1
    negative = low.abs() > high.abs()
    scale = ((high - low) / top).clamp_min(1e-7)
    scale = torch.where(negative, scale, -scale)
    edge = torch.where(negative, low, high)
    q0 = torch.round(edge / scale)
    scale = torch.where(q0 != 0, edge / torch.where(q0 != 0, q0, 1), scale)
    bias = torch.where(q0 == 0, 0, edge)
    scale, bias = scale.bfloat16().float(), bias.bfloat16().float()
    safe = torch.where(scale == 0, 1e-7, scale)
    codes = torch.round((x - bias[..., None]) / safe[..., None]).clamp(0, top)
    return codes, scale, bias


def rounded(w: torch.Tensor) -> torch.Tensor:
    """The values a matrix has after a trip through 4 bits, in MLX's bfloat16 arithmetic."""
    codes, scale, bias = codes_of(w)
    product = (codes * scale[..., None]).bfloat16().float()
    return (product + bias[..., None]).bfloat16().float().flatten(-2)


def is_stored_in_4_bits(name: str, w: torch.Tensor) -> bool:
    return w.ndim == 2 and w.shape[0] >= 64 and w.shape[1] % GROUP == 0 and "conv1d" not in name


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        nn.init.normal_(self.weight, std=0.5 * inputs**-0.5)
        self.qat = False

    def effective(self) -> torch.Tensor:
        w = self.weight
        if self.qat and is_stored_in_4_bits("", w):
            w = w + (rounded(w) - w).detach()
        return w

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.effective().to(x.dtype))


class Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS)
        return (y * self.weight).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on the first part of the last axis; x [..., T, D], cos and sin [T, part / 2]."""
    part = cos.shape[-1]
    a, b, rest = x[..., :part].float(), x[..., part : 2 * part].float(), x[..., 2 * part :]
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], -1)


def rope_table(cfg: dict, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dims = int(cfg["head_dim"] * cfg["rope_part"])
    inv = THETA ** (-torch.arange(0, dims, 2, device=positions.device).float() / dims)
    angle = positions.float()[..., None] * inv
    return angle.cos(), angle.sin()


class Attention(nn.Module):
    def __init__(self, cfg: dict):
        super().__init__()
        self.cfg, self.gated = cfg, cfg["interval"] > 1
        d, h, kv, e = cfg["hidden"], cfg["heads"], cfg["kv"], cfg["head_dim"]
        self.q_proj = Linear(d, h * e * (2 if self.gated else 1))
        self.k_proj, self.v_proj = Linear(d, kv * e), Linear(d, kv * e)
        self.o_proj = Linear(h * e, d)
        self.q_norm, self.k_norm = Norm(e), Norm(e)

    def parts(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        q = self.q_proj(x).unflatten(-1, (self.cfg["heads"], -1))
        gate = None
        if self.gated:
            q, gate = q.chunk(2, -1)
            gate = gate.flatten(-2)
        k = self.k_proj(x).unflatten(-1, (self.cfg["kv"], -1))
        v = self.v_proj(x).unflatten(-1, (self.cfg["kv"], -1)).transpose(1, 2)
        q = rotate(self.q_norm(q).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(k).transpose(1, 2), cos, sin)
        return q, k, v, gate

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q, k, v, gate = self.parts(x, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        y = y.transpose(1, 2).flatten(-2)
        return self.o_proj(y if gate is None else y * torch.sigmoid(gate))


def chunked_gated_delta(q, k, v, g, beta, size: int = 64) -> torch.Tensor:
    """The gated delta rule in chunks. q, k [B, H, T, Dk], v [B, H, T, Dv], g (log), beta [B, H, T].

    Inside a chunk (I - N) X = R is solved by inverting 16-row blocks and joining them: powers of N
    over the whole chunk overflow when keys are alike.
    """
    batch, heads, time_, _ = q.shape
    if rest := -time_ % size:
        q, k, v = (F.pad(t, (0, 0, 0, rest)) for t in (q, k, v))
        g, beta = (F.pad(t, (0, rest)) for t in (g, beta))
    q, k, v = (t.unflatten(2, (-1, size)) for t in (q, k, v))
    g, beta = (t.unflatten(2, (-1, size)).float() for t in (g, beta))
    c = g.cumsum(-1)
    lower = torch.ones(size, size, device=q.device, dtype=torch.bool).tril()
    decay = (c[..., :, None] - c[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    n = -(beta[..., None] * (k @ k.transpose(-1, -2)).float() * decay).tril(-1)
    blocks = n.unflatten(-1, (-1, 16)).unflatten(-3, (-1, 16))  # [..., 4, 16, 4, 16]
    p = torch.stack([blocks[..., i, :, i, :] for i in range(size // 16)], -3)
    inverse = p + torch.eye(16, device=q.device)
    for _ in range(3):
        p = p @ p
        inverse = inverse + p @ inverse
    width = 16
    while width < size:
        a, b = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        tiles = n.unflatten(-1, (-1, width)).unflatten(-3, (-1, width))
        corner = torch.stack(
            [tiles[..., 2 * i + 1, :, 2 * i, :] for i in range(size // width // 2)], -3
        )
        inverse = torch.cat(
            [
                torch.cat([a, torch.zeros_like(a)], -1),
                torch.cat([b @ corner @ a, b], -1),
            ],
            -2,
        )
        width *= 2
    inverse = inverse.squeeze(-3)
    kf, vf = k.float(), v.float()
    u = inverse @ (beta[..., None] * vf)
    w = inverse @ ((beta * c.exp())[..., None] * kf)
    inside = (q @ k.transpose(-1, -2)).float() * decay
    q_in = q.float() * c.exp()[..., None]
    k_out = kf * (c[..., -1:] - c).exp()[..., None]
    last = c[..., -1].exp()
    state = torch.zeros(batch, heads, q.shape[-1], v.shape[-1], device=q.device)
    out = []
    for i in range(q.shape[2]):
        delta = u[:, :, i] - w[:, :, i] @ state
        out.append(q_in[:, :, i] @ state + inside[:, :, i] @ delta)
        state = last[:, :, i, None, None] * state + k_out[:, :, i].transpose(-1, -2) @ delta
    return torch.stack(out, 2).flatten(2, 3)[:, :, :time_]


class Conv(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, 4, 1) * 0.3)


class GatedDelta(nn.Module):
    def __init__(self, cfg: dict):
        super().__init__()
        self.cfg = cfg
        d, hk, hv, e = cfg["hidden"], cfg["key_heads"], cfg["value_heads"], cfg["dim"]
        self.in_proj_qkv = Linear(d, (2 * hk + hv) * e)
        self.in_proj_z, self.out_proj = Linear(d, hv * e), Linear(hv * e, d)
        self.in_proj_a, self.in_proj_b = Linear(d, hv), Linear(d, hv)
        self.conv1d = Conv((2 * hk + hv) * e)
        self.A_log = nn.Parameter(torch.linspace(1, 16, hv).log())
        step = torch.linspace(math.log(1e-3), math.log(1e-1), hv).exp()
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.norm = Norm(e)

    def heads(self, y: torch.Tensor):
        """q, k, v [B, Hv, T, D] from the convolved projection [B, T, C]."""
        hk, hv, e = self.cfg["key_heads"], self.cfg["value_heads"], self.cfg["dim"]
        q, k, v = y.split([hk * e, hk * e, hv * e], -1)
        q, k, v = (t.unflatten(-1, (-1, e)).transpose(1, 2) for t in (q, k, v))
        q, k = (
            (t.float() * torch.rsqrt(t.float().square().sum(-1, keepdim=True) + 1e-6)).to(t.dtype)
            for t in (q, k)
        )
        share = hv // hk
        return (
            (q * e**-0.5).repeat_interleave(share, 1),
            k.repeat_interleave(share, 1),
            v,
        )

    def gates(self, x: torch.Tensor):
        """log decay and beta, [B, Hv, T], float32."""
        a = self.in_proj_a(x).float()
        g = -self.A_log.exp() * F.softplus(a + self.dt_bias)
        return g.transpose(1, 2), torch.sigmoid(self.in_proj_b(x).float()).transpose(1, 2)

    def finish(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """o [B, Hv, T, D] to the layer's output."""
        z = self.in_proj_z(x).unflatten(-1, (-1, self.cfg["dim"]))
        o = self.norm(o.transpose(1, 2).to(x.dtype))
        return self.out_proj((o.float() * F.silu(z.float())).to(x.dtype).flatten(-2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = F.pad(self.in_proj_qkv(x), (0, 0, 3, 0))
        w = self.conv1d.weight[:, :, 0].to(u.dtype)
        y = sum(u[:, i : i + x.shape[1]] * w[:, i] for i in range(4))
        q, k, v = self.heads(F.silu(y))
        g, beta = self.gates(x)
        return self.finish(chunked_gated_delta(q, k, v, g, beta), x)


class Mlp(nn.Module):
    def __init__(self, cfg: dict):
        super().__init__()
        d, i = cfg["hidden"], cfg["inter"]
        self.gate_proj, self.up_proj, self.down_proj = Linear(d, i), Linear(d, i), Linear(i, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, cfg: dict, index: int):
        super().__init__()
        self.recurrent = (index + 1) % cfg["interval"] != 0
        if self.recurrent:
            self.linear_attn = GatedDelta(cfg)
        else:
            self.self_attn = Attention(cfg)
        self.input_layernorm = Norm(cfg["hidden"])
        self.post_attention_layernorm = Norm(cfg["hidden"])
        self.mlp = Mlp(cfg)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        h = self.input_layernorm(x)
        x = x + (self.linear_attn(h) if self.recurrent else self.self_attn(h, cos, sin))
        return x + self.mlp(self.post_attention_layernorm(x))


class Target(nn.Module):
    def __init__(self, kind: str, layers: int | None = None):
        super().__init__()
        self.kind, self.cfg = kind, KINDS[kind] | ({} if layers is None else {"layers": layers})
        self.embed_tokens = Linear(self.cfg["hidden"], VOCABULARY)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(self.cfg, i) for i in range(self.cfg["layers"]))
        for layer in self.layers:
            for part in (layer.linear_attn if layer.recurrent else layer.self_attn, layer.mlp):
                last = [m for m in part.modules() if isinstance(m, Linear)]
                out = getattr(
                    part, "out_proj", getattr(part, "o_proj", getattr(part, "down_proj", last[-1]))
                )
                nn.init.zeros_(out.weight)
        self.norm = Norm(self.cfg["hidden"])

    def hidden(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        x = F.embedding(ids, self.embed_tokens.effective()).to(dtype)
        cos, sin = rope_table(self.cfg, torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def forward(self, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.embed_tokens(self.hidden(ids, dtype))

    def quantize(self, on: bool) -> None:
        """Train (and run) with weights rounded to 4 bits, or not."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.qat = on


class Ahead(nn.Module):
    """Heads for the tokens after the next one (multi-token prediction, arXiv 2404.19737): they are
    thrown away, and what they taught the hidden states stays. A drafter reads those."""

    def __init__(self, hidden: int, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.weight = nn.Parameter(torch.zeros(tokens, hidden, hidden))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, T, D] to [B, T, D]; row i is of the head for the token i % tokens after the next."""
        of_row = self.weight.to(hidden.dtype)[self.offsets(hidden) - 1]
        return hidden + hidden @ of_row

    def offsets(self, hidden: torch.Tensor) -> torch.Tensor:
        """How many tokens after the next each row looks, [B], from 1."""
        return torch.arange(hidden.shape[0], device=hidden.device) % self.tokens + 1

    def labels(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """[B, T] of ids [B, at least T + 1 + tokens]."""
        place = torch.arange(hidden.shape[1], device=ids.device)
        return ids.gather(1, self.offsets(hidden)[:, None] + 1 + place)
