"""Step -> rates. Pure arithmetic."""

MUON_MOMENTUM = (0.85, 0.95)  # first and final value
MUON_MOMENTUM_STEPS = 300


def lr_scale(
    step: int, num_iterations: int, warmup_ratio: float, warmdown_ratio: float, final_frac: float
) -> float:
    """Factor of every learning rate at `step` of `num_iterations`: ramp up, hold, ramp down.

    warmup_ratio, warmdown_ratio  shares of the run; final_frac  the factor at the very end.
    """
    warmup_steps = round(warmup_ratio * num_iterations)
    warmdown_steps = round(warmdown_ratio * num_iterations)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step <= num_iterations - warmdown_steps:
        return 1.0
    progress = (num_iterations - step) / warmdown_steps
    return progress + (1 - progress) * final_frac


def muon_momentum(step: int) -> float:
    """Momentum of Muon: linear from 0.85 to 0.95 over the first 300 steps."""
    first, final = MUON_MOMENTUM
    fraction = min(step / MUON_MOMENTUM_STEPS, 1.0)
    return first + fraction * (final - first)
