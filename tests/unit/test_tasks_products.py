"""Linear layers by oneDNN: the same function as PyTorch's own, on the weights where they lie."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
nn = torch.nn
products = pytest.importorskip("fanfold.tasks.products")

on_avx512 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="layers are left to PyTorch on this CPU"
)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 100), nn.GELU(), nn.Linear(100, 7, bias=False)).eval()


@on_avx512
@pytest.mark.parametrize("shape", [(1, 48), (2, 48), (3, 48), (1, 12, 48), (4, 65, 48), (0, 48)])
def test_the_same_values_as_pytorch(shape):
    whole, quick = model(), products.quicken(model())
    assert type(quick[0]) is not nn.Linear
    x = torch.randn(shape)
    with torch.inference_mode():
        expected, found = whole(x), quick(x)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(quick(x), found)


@on_avx512
def test_the_weights_stay_where_they_are():
    quick = model()
    before = {name: parameter.data_ptr() for name, parameter in quick.named_parameters()}
    products.quicken(quick)
    with torch.inference_mode():
        quick(torch.randn(5, 48))
    assert {name: parameter.data_ptr() for name, parameter in quick.named_parameters()} == before


def test_what_is_not_a_float32_linear_layer_is_left_alone():
    class Own(nn.Linear):
        pass

    others = nn.Sequential(nn.Linear(4, 4).double(), Own(4, 4), nn.LayerNorm(4))
    kinds = [type(module) for module in copy.deepcopy(others)]
    assert [type(module) for module in products.quicken(others)] == kinds
