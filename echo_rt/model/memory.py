"""The evolving memory: memory queries attend to what leaves the local window, and a gate blends the result in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from echo_rt.config import ModelConfig
from echo_rt.model.linear import Weights
from echo_rt.ops.schema import Ops
from echo_rt.utils.device import placed

# Tokens that the gate's mean is taken over, about.
_GATE_SAMPLE = 128


class _EncoderLayer:
    def __init__(self, load: Weights, layer: str) -> None:
        self.norm1 = load.matrix(f"{layer}.norm1.weight")
        self.q = load.linear(f"{layer}.q")
        self.norm_q = load.vector(f"{layer}.norm_q.weight")
        self.o = load.linear(f"{layer}.o")
        self.norm2 = load.matrix(f"{layer}.norm2.weight")
        self.ffn_in = load.linear(f"{layer}.ffn.0")
        self.ffn_out = load.linear(f"{layer}.ffn.2")


class MemoryEncoder:
    """Weights of the memory encoder; the state itself belongs to the stream (:mod:`echo_rt.engine.state`)."""

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], ops: Ops, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        assert config.memory is not None
        self._ops, self._eps = ops, config.transformer.eps
        self._dim = config.transformer.dim
        self._heads = (config.transformer.num_heads, config.transformer.head_dim)

        load = Weights(tensors, device, dtype)
        self.query_init = load.matrix("query_init")[0]
        self._layers = [_EncoderLayer(load, f"layers.{index}") for index in range(config.memory.layers)]
        self._connector_in, self._connector_out = load.linear("connector_proj.0"), load.linear("connector_proj.2")
        self._connector_norm = load.vector("connector_proj.3.weight")
        # A kernel of ours reads it, where torch's need no alignment.
        self._gate_weight, self._gate_bias = (
            placed(tensors[f"gate_linear.{part}"], device, dtype) for part in ("weight", "bias")
        )
        self._to_k, self._to_v = load.linear("to_k"), load.linear("to_v")
        self._norm_k_out = load.matrix("norm_k_out.weight") if config.memory.normalize_k else None

    def update(self, state: Tensor, k: Tensor, v: Tensor, out: Tensor, gate_mean: Tensor) -> None:
        """``out [M, dim]`` (written) = the state after it has seen keys ``k`` and values ``v [n, H, d]``.

        ``out`` must not be ``state``: the gate reads all of the old one. ``gate_mean`` float32 [1] (written): the mean
        of the gate over a sample of the tokens, how much of the old state stayed.
        """
        s = state
        for layer in self._layers:
            q = layer.q(self._norm(s, layer.norm1))
            s = s + layer.o(self._ops.memory_attention(q, layer.norm_q, k, v, self._eps))
            s = s + layer.ffn_out(layer.ffn_in.then_gelu(self._norm(s, layer.norm2)))
        candidate = self._connector_out(self._connector_in.then_gelu(s))
        gate = self._gate_weight, self._gate_bias
        self._ops.gated_update(state, candidate, self._connector_norm, *gate, out, self._eps)
        self._sample_gate(state, candidate, gate_mean)

    def _sample_gate(self, state: Tensor, candidate: Tensor, gate_mean: Tensor) -> None:
        # The kernel keeps the gate to itself, and all of it would be much to write; evenly spaced tokens tell as much.
        stride = -(-state.shape[0] // _GATE_SAMPLE)
        old, weight = state[::stride], self._gate_weight
        new = rms_norm(candidate[::stride].float(), (self._dim,), self._connector_norm, self._eps).to(old.dtype)
        gate = linear(old, weight[:, : self._dim], self._gate_bias) + linear(new, weight[:, self._dim :])
        gate_mean.copy_(gate.float().sigmoid().mean())

    def keys_values(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The memory's unrotated keys and its values, ``[M, H, d]`` each, one pair for all layers."""
        k = self._to_k(state)
        if self._norm_k_out is not None:
            k = self._norm(k, self._norm_k_out)
        return k.unflatten(-1, self._heads), self._to_v(state).unflatten(-1, self._heads)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, (self._dim,), weight, self._eps)
