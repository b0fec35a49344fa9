"""The kernels: importing this registers the operations ``torch.ops.echo_rt.*``."""

BACKEND: str
"""What the kernels were compiled for: ``emulated`` (CPU tensors) or ``cuda``."""
VERSION: str
"""Version of echo-rt that was compiled."""
TORCH: str
"""Version of torch that it was compiled against."""
CUDA_ARCHS: str
"""GPU architectures inside, separated by spaces; empty for the emulated kernels."""
