"""What a request's headers ask of how it is served."""

import math

from starlette.requests import Request

from morphserve.quantize.manifest import Variant
from morphserve.runtime.request import Demands, Slo
from morphserve.runtime.server.errors import bad_request

MIN_PRECISION = "x-morph-min-precision"
SLO_TTFT = "x-slo-ttft-ms"
SLO_TPOT = "x-slo-tpot-ms"


def demands(request: Request, cache_salt: str | None) -> Demands:
    """Raises ApiError naming the header that is wrong.

    Callers with different API keys share no KV blocks, whatever their salts.
    """
    slo = Slo(ttft_s=_seconds(request, SLO_TTFT), tpot_s=_seconds(request, SLO_TPOT))
    salt = request.state.cache_namespace + (cache_salt or "")
    return Demands(_min_precision(request), slo, salt)


def _min_precision(request: Request) -> Variant:
    text = request.headers.get(MIN_PRECISION, Variant.INT4.value)
    try:
        return Variant(text)
    except ValueError:
        names = ", ".join(variant.value for variant in Variant)
        raise bad_request(
            f"{MIN_PRECISION} must be one of {names}, not {text[:40]!r}", MIN_PRECISION
        ) from None


def _seconds(request: Request, name: str) -> float | None:
    text = request.headers.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise bad_request(f"{name} must be a positive number, not {text[:40]!r}", name)
    return value / 1000
