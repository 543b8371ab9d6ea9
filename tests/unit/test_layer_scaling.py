import pytest

from mllm_keeplora.linalg.layer_scaling import layer_scales


def test_scales_rise_linearly_from_gamma_to_one() -> None:
    scales = layer_scales(5, 0.2)
    assert scales == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert len(layer_scales(23, 0.2)) == 23


def test_gamma_one_switches_scaling_off() -> None:
    assert layer_scales(4, 1.0) == [1.0] * 4


def test_a_single_layer_is_not_scaled() -> None:
    assert layer_scales(1, 0.2) == [1.0]


@pytest.mark.parametrize("num_layers, gamma", [(0, 0.2), (3, -0.1), (3, 1.1)])
def test_bad_values_are_refused(num_layers: int, gamma: float) -> None:
    with pytest.raises(ValueError, match=str(num_layers if num_layers < 1 else gamma)):
        layer_scales(num_layers, gamma)
