"""Speed of light: the seconds an operation must take on a machine of given peaks.

    seconds = max(flops / peak_flops, bytes / peak_bytes)

Source  S. Williams, A. Waterman, D. Patterson, "Roofline", CACM 52(4), 2009.
"""

from nanochat.kernels.registry import Cost


def speed_of_light(cost: Cost, flops_per_second: float, bytes_per_second: float) -> float:
    """Least seconds for `cost`, with both peaks in units per second.

    Raises  ValueError if a peak is not positive.
    """
    if flops_per_second <= 0 or bytes_per_second <= 0:
        raise ValueError(
            f"peaks must be positive, got {flops_per_second} FLOP/s and {bytes_per_second} B/s"
        )
    return max(cost.flops / flops_per_second, cost.bytes / bytes_per_second)


def bound(cost: Cost, flops_per_second: float, bytes_per_second: float) -> str:
    """ "compute" or "memory": which of the two limits `cost` meets first."""
    by_compute = cost.flops / flops_per_second >= cost.bytes / bytes_per_second
    return "compute" if by_compute else "memory"
