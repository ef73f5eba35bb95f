"""Which Triton kernels were launched: recorded in Triton itself, compiled or interpreted, so that none is missed."""

from __future__ import annotations

from typing import Any

import pytest
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

launched: list[str] = []
"""Names of the kernels launched since the list was last cleared, in order."""


def record() -> None:
    """Write every launch of this process to `launched`; call once."""
    for kind in (JITFunction, InterpretedFunction):
        kind.run = _recorded(kind.run)


def _recorded(run: Any) -> Any:
    def recorded(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if not warmup:
            launched.append(self.fn.__name__)
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    return recorded


def _marks(forward: list[str], backward: list[str]) -> tuple[Any, Any]:
    """For tests of the forward pass alone, and of both."""
    names = [f"{name}_kernel" for name in (*forward, *backward)]
    return pytest.mark.launches(*names[: len(forward)]), pytest.mark.launches(*names)


# The kernels of every call of a family; others, for masks, slices or convolutions, depend on the call and on the chip.
performer_forward, performer = _marks(
    ["performer_state_fwd", "performer_read_fwd"],
    ["performer_read_dq", "performer_read_dstate", "performer_state_bwd"],
)
causal_forward, causal = _marks(["performer_causal_fwd"], ["performer_causal_dq", "performer_causal_dkv"])
nystrom_forward, nystrom = _marks(["nystrom_read_fwd"], ["nystrom_delta", "nystrom_landmark_bwd", "nystrom_token_bwd"])
disentangled_forward, disentangled = _marks(["disentangled_fwd"], ["disentangled_dq", "disentangled_dkv"])
embed_forward, embed = _marks(["patch_embed_fwd"], ["patch_embed_dw"])
_, unembed = _marks(["patch_embed_dx"], ["patch_embed_fwd", "patch_embed_dw"])
_, inner_dx = _marks(["tnt_fwd"], ["tnt_mlp_dx", "tnt_attn_dx"])  # where no weight requires a gradient
inner_forward, inner = _marks(["tnt_fwd"], ["tnt_mlp_dx", "tnt_attn_dx", "tnt_mlp_dw", "tnt_attn_dw"])
outer_forward, outer = _marks(["tnt_outer_fwd"], ["tnt_outer_dx", "tnt_outer_dw"])
none = pytest.mark.launches()
some = pytest.mark.launches("*")  # of calls that other tests hold to their kernels by name
mixed = pytest.mark.launches("?")  # of tests over calls in PyTorch and in Triton


def backends(mark: Any) -> list[Any]:
    """Values of a parameter `backend`: PyTorch, which launches none, and Triton, which launches those of `mark`."""
    return [pytest.param("torch", marks=none), pytest.param("triton", marks=mark)]
