"""The forecast's arithmetic."""

import pytest

from experiments.mxfp4.layers.recipes import RECIPES, Product
from experiments.mxfp4.speed import forecast
from experiments.mxfp4.speed.forecast import DATASHEET, DEPTHS, REACHED, Rates
from nanochat import hardware, scaling

FREE_MEMORY = Rates("no memory limit", 1.0, 2.0, 4.0, 1e30, "")


def test_without_a_memory_limit_a_recipe_gains_what_its_formats_gain() -> None:
    """fprop twice, dgrad and wgrad four times as fast: 3 / (1/2 + 1/4 + 1/4) = 3."""
    for name, ratio in (("mx8f_mx4b", 3.0), ("mxfp4_rtn", 4.0), ("mxfp8", 2.0),
                        ("mxfp4_rht_sr", 2.0), ("mxfp4_no_wgrad", 2.0)):  # fmt: skip
        got = forecast.ratios(name, FREE_MEMORY, forecast.WHAT[0])
        assert got == pytest.approx([ratio] * len(DEPTHS))


def test_the_head_and_attention_hold_a_step_back() -> None:
    """d12 by hand, in units of 2 x tokens x width: 36 depth of linear layers, 3 depth of the
    context for attention, 3 of the vocabulary."""
    width, depth = scaling.model_width(12), 12
    rest = 3 * forecast.VOCABULARY + 3 * depth * forecast.CONTEXT
    linear = 3 * 12 * width * depth
    want = (linear + rest) / (linear / 4 + rest)
    got = forecast.ratios("mxfp4_rtn", FREE_MEMORY, forecast.WHAT[1])[DEPTHS.index(12)]
    assert got == pytest.approx(want)
    with_head = forecast.ratios("mxfp4_rtn", FREE_MEMORY, forecast.WHAT[2])[DEPTHS.index(12)]
    want = (linear + rest) / (linear / 4 + rest - 1.5 * forecast.VOCABULARY)
    assert with_head == pytest.approx(want)


def test_bytes_of_a_product_and_of_a_quantizer() -> None:
    """With endless arithmetic only memory counts."""
    fast = Rates("memory alone", 1e30, 1e30, 1e30, 1.0, "")
    fp4 = Product.of("mxfp4")
    assert forecast.product_seconds(64, 32, 96, fp4, 2, fast) == pytest.approx(
        (64 * 96 + 32 * 96) * 4.25 / 8 + 64 * 32 * 2
    )
    assert forecast.product_seconds(64, 32, 96, None, 2, fast) == pytest.approx(
        2 * (64 * 96 + 32 * 96 + 64 * 32)
    )
    both = forecast.quantize_seconds(1000, 2, (fp4, Product.of("mxfp8_e4m3")), fast)
    assert both == pytest.approx(1000 * (2 + 4.25 / 8 + 8.25 / 8))
    assert forecast.quantize_seconds(1000, 2, (None, None), fast) == 0


def test_bytes_of_a_layer() -> None:
    """16 tokens, 32 inputs, 64 outputs; x and dy are read in 16 bits, W in 32, each once."""
    slow = Rates("memory alone", 1e30, 1e30, 1e30, 1.0, "")
    layer, tokens, codes = forecast.Layer(64, 32), 16, 4.25 / 8
    x, w, dy = tokens * layer.inputs, layer.outputs * layer.inputs, tokens * layer.outputs
    outputs = 2 * (dy + x) + 8 * w
    quantizers = x * (2 + 2 * codes) + w * (4 + 2 * codes) + dy * (2 + 2 * codes)
    got = forecast.layer_seconds(layer, RECIPES["mxfp4_rtn"], tokens, slow)
    assert got == pytest.approx(quantizers + 2 * codes * (x + w + dy) + outputs)
    got = forecast.layer_seconds(layer, None, tokens, slow)
    assert got == pytest.approx(6 * w + 2 * 2 * (x + w + dy) + outputs)


def test_gains_grow_with_depth_and_are_below_the_rates() -> None:
    for rates in (REACHED, DATASHEET):
        for name in forecast.SHOWN:
            for what in forecast.WHAT[:2]:
                ratios = forecast.ratios(name, rates, what)
                assert ratios == sorted(ratios)
                assert ratios[-1] < rates.fp4 / rates.bf16
    d8 = DEPTHS.index(8)
    step = forecast.ratios("mx8f_mx4b", REACHED, forecast.WHAT[1])
    assert step[d8 - 1] < 1.2, "below d8 four bits do not pay"


def test_rates_of_the_datasheet_are_the_ones_of_the_hardware_table() -> None:
    (gpu,) = (gpu for gpu in hardware.GPUS if gpu.name == "RTX 5090")
    assert DATASHEET.bf16 == gpu.bf16_flops
    assert DATASHEET.memory == gpu.memory_bytes_per_s


def test_the_forecast_says_what_it_is() -> None:
    text = forecast.markdown()
    assert "NOT MEASURED" in text.splitlines()[0]
    assert "not built" in text
    assert text.count("| mx8f_mx4b |") == 2 * len(forecast.WHAT)
