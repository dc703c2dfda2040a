"""unpack: the rows of a packed weight are those of its definition, each where it belongs."""

import pytest
import torch
from compare import differing

from kernels.quant import dequantise, quantise
from kernels.unpack import unpack

DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("O,D", [(16, 64), (40, 192), (24, 640)], ids=str)
def test_every_weight_stands_at_its_place_and_the_rest_of_the_room_is_untouched(O, D, dtype, device):
    w, room = quantise(torch.randn(O, D, device=device), 4), torch.full((O * D + 64,), 7.0, dtype=dtype, device=device)
    y_OD = unpack(w, dtype, room)
    assert y_OD.data_ptr() == room.data_ptr() and bool((room[O * D:] == 7).all())
    assert differing(y_OD, dequantise(w).to(dtype)) == 0
    assert differing(unpack(w, dtype), y_OD) == 0


def test_other_weights_and_floats_come_by_the_definition(device):
    w_OD = torch.randn(40, 128, device=device)
    for bits, dtype in ((8, torch.float16), (4, torch.float32)):
        w = quantise(w_OD, bits)
        assert differing(unpack(w, dtype), dequantise(w).to(dtype)) == 0
