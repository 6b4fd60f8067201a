"""How tokens are drawn, packed on the host and brought to the device in one copy."""

from array import array
from collections.abc import Sequence

import torch

from morphserve.runtime.kernels import GREEDY, Draw
from morphserve.runtime.kernels.cuda.sampling import DeviceDraws
from morphserve.runtime.uploads import on_device

_COLDEST, _HOTTEST = 1e-30, 1e30  # temperatures beyond act alike, and may not fit a float32
_LAST = 1 - 2.0**-24  # the greatest float32 less than 1
_ALIGNED = 4  # numbers in 16 bytes; kernels are compiled anew for tensors that start elsewhere


def pack_draws(draws: Sequence[Draw], vocab: int, device: torch.device) -> DeviceDraws | None:
    """None if all are greedy. One upload of five rows, each padded to 16 bytes."""
    if all(draw.temperature == 0 for draw in draws):
        return None
    padded = [*draws, *[GREEDY] * (-len(draws) % _ALIGNED)]
    numbers = array("f", [_float32_temperature(draw.temperature) for draw in padded])
    numbers.extend(draw.min_p for draw in padded)
    numbers.extend(draw.top_p for draw in padded)
    numbers.extend(min(draw.uniform, _LAST) for draw in padded)
    top_k = array("i", [draw.top_k if 0 < draw.top_k < vocab else 0 for draw in padded])
    host = torch.frombuffer(bytearray(numbers.tobytes() + top_k.tobytes()), dtype=torch.int32)
    rows = on_device(host, device).view(5, len(padded))[:, : len(draws)]
    temperature, min_p, top_p, uniform, _ = rows.view(torch.float32)
    searches = max((k > 0) + (draw.top_p < 1) for k, draw in zip(top_k, padded, strict=True))
    return DeviceDraws(temperature, min_p, top_p, uniform, rows[4], searches)


def _float32_temperature(temperature: float) -> float:
    return min(max(temperature, _COLDEST), _HOTTEST) if temperature else 0.0
