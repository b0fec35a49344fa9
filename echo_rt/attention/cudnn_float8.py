"""cuDNN's attention of float8 tensors, through nvidia-cudnn-frontend."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from echo_rt.autotune.tuner import current
from echo_rt.errors import BackendError
from echo_rt.utils.wording import first_line

_WEIGHT_SCALE = 256.0  # of the softmax's weights, which are at most 1, where float8's largest number is 448


class CudnnFloat8(threading.local):
    """``q [n, H, d]`` and ``k, v [m, H, d]`` e4m3fn, without scales, rows apart -> bfloat16 ``[n, H·d]``.

    A plan for each size is made at its first call, in each thread, as a handle of cuDNN belongs to one thread.
    """

    name = "cudnn-float8"

    def __init__(self) -> None:
        try:
            import cudnn
        except ImportError as error:
            remedy = "pip install nvidia-cudnn-frontend"
            raise BackendError(f"nvidia-cudnn-frontend does not load: {first_line(error)}; {remedy}") from None
        self._cudnn: Any = cudnn
        self._handles: dict[torch.device, Any] = {}
        self._plans: dict[Any, tuple[Any, dict[str, Any], dict[Any, Tensor], int]] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with current(q.device):  # a handle is made for the current GPU
            return self._attend(q, k, v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = {name: t.transpose(0, 1).unsqueeze(0) for name, t in (("q", q), ("k", k), ("v", v))}
        key = (q.device, *((t.shape, t.stride()) for t in seen.values()))
        if key not in self._plans:
            self._plans[key] = self._plan(seen)
        graph, nodes, constants, workspace = self._plans[key]
        out = torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)
        seen["out"] = out.transpose(0, 1).unsqueeze(0)
        given = constants | {nodes[name]: tensor for name, tensor in seen.items()}
        handle = self._handles[q.device]
        self._cudnn.set_stream(handle, torch.cuda.current_stream(q.device).cuda_stream)
        graph.execute(given, torch.empty(workspace, dtype=torch.uint8, device=q.device), handle=handle)
        return out.flatten(-2)

    def _plan(self, seen: dict[str, Tensor]) -> tuple[Any, dict[str, Any], dict[Any, Tensor], int]:
        """Return the graph, its inputs and output, its constants, and the size of its workspace in bytes."""
        device, types = seen["q"].device, self._cudnn.data_type
        if device not in self._handles:
            self._handles[device] = self._cudnn.create_handle()
        graph = self._cudnn.pygraph(
            handle=self._handles[device],
            io_data_type=types.FP8_E4M3,
            intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT,
        )
        nodes = {
            name: graph.tensor(dim=list(t.shape), stride=list(t.stride()), data_type=types.FP8_E4M3)
            for name, t in seen.items()
        }
        constants: dict[Any, Tensor] = {}
        factors = {"scale_s": _WEIGHT_SCALE, "descale_s": 1 / _WEIGHT_SCALE}
        arguments = dict(nodes)
        for name in ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o"):
            node = graph.tensor(dim=[1] * 4, stride=[1] * 4, data_type=types.FLOAT)
            arguments[name], constants[node] = node, torch.full((1, 1, 1, 1), factors.get(name, 1.0), device=device)
        size = seen["q"].shape[-1]
        out, _, *largest = graph.sdpa_fp8(**arguments, attn_scale=size**-0.5, generate_stats=False)
        like = torch.empty_like(seen["q"][0].transpose(0, 1), dtype=torch.bfloat16).contiguous().transpose(0, 1)[None]
        out.set_output(True).set_dim(list(like.shape)).set_stride(list(like.stride())).set_data_type(types.BFLOAT16)
        for node in largest:  # of the scores and of the output, which training would read
            node.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(types.FLOAT)
            constants[node] = torch.empty(1, 1, 1, 1, device=device)
        graph.build([self._cudnn.heur_mode.A])
        return graph, nodes | {"out": out}, constants, max(1, graph.get_workspace_size())
