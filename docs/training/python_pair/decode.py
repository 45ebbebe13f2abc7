"""Decode a whole batch at once: one captured CUDA graph a token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from model import Layer, Linear, Target, rope_table
from torch import nn


class Decoder:
    """Decodes a whole batch with one captured CUDA graph a token; prompts are fed one by one."""

    def __init__(self, model: Target, batch: int, length: int, device: str):
        self.model, self.batch, self.length, self.device = model, batch, length, device
        cfg, dtype = model.cfg, torch.bfloat16 if device == "cuda" else torch.float32
        self.dtype = dtype
        self.ids = torch.zeros(batch, length + 1, dtype=torch.long, device=device)
        self.prompt_length = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = torch.zeros((), dtype=torch.long, device=device)
        self.temperature = torch.zeros(batch, 1, device=device)
        self.slots = torch.arange(length, device=device)
        self.weights = {
            n: torch.empty_like(p, dtype=dtype if p.ndim >= 2 else torch.float32)
            for n, p in model.named_parameters()
        }
        self.cache = []
        for layer in model.layers:
            if layer.recurrent:
                e, hv = cfg["dim"], cfg["value_heads"]
                width = layer.linear_attn.conv1d.weight.shape[0]
                self.cache.append((
                    torch.zeros(batch, 3, width, dtype=dtype, device=device),
                    torch.zeros(batch, hv, e, e, device=device),
                ))  # fmt: skip
            else:
                shape = (batch, cfg["kv"], length, cfg["head_dim"])
                self.cache.append(
                    tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
                )
        self.graph: torch.cuda.CUDAGraph | None = None
        self.advance = torch.compile(advance) if device == "cuda" else advance

    def refresh(self) -> None:
        modules = dict(self.model.named_modules())
        for name, parameter in self.model.named_parameters():
            module = modules[name.rpartition(".")[0]]
            value = module.effective() if isinstance(module, Linear) else parameter
            self.weights[name].copy_(value.detach())

    def step(self) -> None:
        token = self.ids.gather(1, self.position.expand(self.batch, 1))
        w = self.weights
        x = F.embedding(token, w["embed_tokens.weight"])
        cos, sin = rope_table(self.model.cfg, self.position[None])
        call = torch.func.functional_call
        for i, (layer, cache) in enumerate(zip(self.model.layers, self.cache, strict=True)):
            part = {
                n.removeprefix(f"layers.{i}."): t
                for n, t in w.items()
                if n.startswith(f"layers.{i}.")
            }
            x = call(
                _Step(layer, self, cache), {f"layer.{n}": t for n, t in part.items()}, (x, cos, sin)
            )
        x = call(self.model.norm, {"weight": w["norm.weight"]}, (x,))
        logits = F.linear(x[:, 0], w["embed_tokens.weight"]).float()
        noise = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-9, 1 - 1e-7)))
        chosen = (logits + self.temperature * noise).argmax(-1, keepdim=True)
        following = (self.position + 1).expand(self.batch, 1)
        given = self.ids.gather(1, following)
        self.ids.scatter_(1, following, torch.where(following < self.prompt_length, given, chosen))
        self.position += 1

    @torch.no_grad()
    def run(
        self,
        prompts: torch.Tensor,
        total: int,
        temperature: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
    ):
        """ids [batch, total] whose first columns are the prompts [batch, P], or the first
        lengths [batch, 1] of them."""
        lengths = torch.tensor(prompts.shape[1]) if lengths is None else lengths
        was = [(m, m.qat) for m in self.model.modules() if isinstance(m, Linear)]
        self.refresh()
        for module, _ in was:
            module.qat = False  # self.weights are rounded already
        if self.device == "cuda" and self.graph is None:
            self._reset(prompts, lengths, temperature)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.step()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.step()
        self._reset(prompts, lengths, temperature)
        for _ in range(total - 1):
            self.graph.replay() if self.graph else self.step()
        for module, on in was:
            module.qat = on
        return self.ids[:, :total].clone()

    def _reset(
        self, prompts: torch.Tensor, lengths: torch.Tensor, temperature: torch.Tensor | None
    ) -> None:
        self.ids.zero_()
        self.ids[:, : prompts.shape[1]] = prompts
        self.prompt_length.copy_(lengths)
        self.position.zero_()
        self.temperature.copy_(0 if temperature is None else temperature)
        for pair in self.cache:
            for tensor in pair:
                tensor.zero_()


def advance(state, q, k, v, g, beta) -> torch.Tensor:
    """One token of the gated delta rule; state [B, H, Dk, Dv] is written in place."""
    decayed = state * g.exp()[..., None, None]
    delta = (v - (k[..., None] * decayed).sum(-2)) * beta[..., None]
    after = decayed + k[..., None] * delta[..., None, :]
    out = (q[..., None] * after).sum(-2)
    state.copy_(after)
    return out


class _Step(nn.Module):
    """One layer, one token, caches written in place."""

    def __init__(self, layer: Layer, decoder: Decoder, cache: tuple):
        super().__init__()
        self.layer = layer
        self.d = [decoder, cache]

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        layer, (decoder, cache) = self.layer, self.d
        h = layer.input_layernorm(x)
        if layer.recurrent:
            part, (window, state) = layer.linear_attn, cache
            u = torch.cat([window, part.in_proj_qkv(h)], 1)
            y = (u * part.conv1d.weight[:, :, 0].T.to(u.dtype)).sum(1, keepdim=True)
            window.copy_(u[:, 1:])
            q, k, v = (t[:, :, 0].float() for t in part.heads(F.silu(y)))
            g, beta = (t[:, :, 0] for t in part.gates(h))
            out = part.finish(decoder.advance(state, q, k, v, g, beta)[:, :, None], h)
        else:
            part, (keys, values) = layer.self_attn, cache
            q, k, v, gate = part.parts(h, cos, sin)
            keys.index_copy_(2, decoder.position[None], k)
            values.index_copy_(2, decoder.position[None], v)
            seen = (decoder.slots <= decoder.position)[None, None, None]
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True)
            y = y.transpose(1, 2).flatten(-2)
            out = part.o_proj(y if gate is None else y * torch.sigmoid(gate))
        x = x + out
        return x + layer.mlp(layer.post_attention_layernorm(x))


def repeats(ids: torch.Tensor, n: int = 8) -> torch.Tensor:
    """Where a token completes an n-gram that stood in the row before, [B, T] bool."""
    keys = torch.zeros_like(ids[:, n - 1 :])
    for i in range(n):
        keys = keys * 1_000_003 + ids[:, i : ids.shape[1] - n + 1 + i]
    same = (keys[:, :, None] == keys[:, None, :]).tril(-1).any(-1)
    return F.pad(same, (n - 1, 0))
