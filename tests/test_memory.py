"""A stream of any length needs the memory of one call, and a state of constant size."""

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vqlm.config import LMConfig
from vqlm.model import LM, LMState

CALL = 1000


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every tensor that operations make, from then until it is freed.

    Unlike the memory of a process it is exact, the same every time, and quick to measure.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.users: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                address, size = storage.data_ptr(), storage.nbytes()
                self.users[address] = self.users.get(address, 0) + 1
                self.live += size if self.users[address] == 1 else 0
                weakref.finalize(x, self.free, address, size)
        self.peak = max(self.peak, self.live)
        return result

    def free(self, address: int, size: int) -> None:
        self.users[address] -= 1
        self.live -= size if self.users[address] == 0 else 0


def tiny(mixer: str) -> LM:
    torch.manual_seed(0)
    config = LMConfig(
        vocab_size=11, n_layer=1, d_model=8, n_head=2, d_k=4, d_v=4, d_ff=8, n_code=5, window=16,
        block=250, n_entry=5, chunk=50, mixers=(mixer,),
    )  # fmt: skip
    return LM(config).eval()


def held(state: LMState) -> int:
    """Bytes that the state keeps alive, which views of larger tensors would add to."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in state.tensors()}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("mixer", ["vq", "window", "ovq", "softmax"])
def test_state_bytes_after_a_thousand_and_a_hundred_thousand_tokens(mixer: str) -> None:
    lm, state, sizes = tiny(mixer), None, {}
    length = 100_000 if mixer != "softmax" else 2_000
    with torch.inference_mode():
        for n_seen in range(CALL, length + 1, CALL):
            state = lm(torch.randint(11, (1, CALL)), state).state
            sizes[n_seen] = state.bytes()
    assert held(state) == state.bytes()
    assert state.length.tolist() == [length]
    if mixer == "softmax":  # keys and values of every token, in float32
        heads, widths = 2, 4 + 4
        assert sizes[2000] - sizes[1000] == heads * widths * 4 * 1000
    else:
        assert sizes[1000] == sizes[100_000] == lm.state_bytes()


def peaks(lm: LM, leaky: bool = False) -> tuple[int, int, int]:
    """Peak bytes of the second call, of all from then to the eighth, and what is left when all
    is over but the state.  (The first call finds an empty window, and is not like the others.)"""
    state, total, leak, found = None, 0.0, [], {}
    with torch.no_grad(), LiveBytes() as memory:
        for call in range(1, 9):
            out = lm(torch.randint(11, (1, CALL)), state)
            state, total = out.state, total + float(out.logits.logsumexp(-1).sum())
            if leaky:
                leak.append(out.logits[:, -1])  # a view: it keeps all of them
            del out
            if call == 1:
                memory.peak = memory.live
            found[call] = memory.peak
    return found[2], found[8], memory.live


@pytest.mark.parametrize("mixer", ["vq", "window", "ovq"])
def test_peak_memory_does_not_grow_with_the_stream(mixer: str) -> None:
    lm = tiny(mixer)
    early, late, left = peaks(lm)
    assert late == early > 10 * lm.state_bytes()
    assert left == lm.state_bytes()


def test_the_measurement_sees_growth_and_leaks() -> None:
    early, late, _ = peaks(tiny("softmax"))
    assert late > 2 * early
    early, late, left = peaks(tiny("vq"), leaky=True)
    assert late - early == 6 * CALL * 11 * 4
    assert left == tiny("vq").state_bytes() + 8 * CALL * 11 * 4


def test_state_and_peak_memory_are_flat_from_2k_to_128k_tokens() -> None:
    torch.manual_seed(0)
    config = LMConfig(
        vocab_size=11, n_layer=2, d_model=16, n_head=2, d_k=8, d_v=8, d_ff=8, n_code=32, window=64,
        block=256, n_entry=256, chunk=128, mixers=("vq", "ovq"),
    )  # fmt: skip
    lm, state, found = LM(config).eval(), None, {}
    with torch.no_grad(), LiveBytes() as memory:
        for n_seen in range(2048, 131_073, 2048):
            memory.peak = memory.live
            out = lm(torch.randint(11, (1, 2048)), state)
            state = out.state
            del out
            found[n_seen] = memory.peak, state.bytes(), held(state)
    assert found[131_072] == found[4096]
    assert found[131_072][1] == found[2048][1] == found[2048][2] == lm.state_bytes()
