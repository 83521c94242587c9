"""The EMA against a float64 loop over single numbers; saved, loaded, swapped in and out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pixart_rt.errors import CheckpointError, ConfigError
from pixart_rt.training.optim.ema import Ema


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))


def walk(model, steps):
    """Random weights after each of the steps, the same for equal seeds."""
    random = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=random))
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.9999])
def test_updates_match_a_float64_loop(model, decay, dtype, device):
    model = model.to(dtype)
    expected = [[x.item() for x in p.flatten()] for p in model.parameters()]
    ema = Ema(model, decay, device)
    for _ in walk(model, 200):
        ema.update()
        for numbers, parameter in zip(expected, model.parameters(), strict=True):
            for i, x in enumerate(parameter.flatten().tolist()):
                numbers[i] = decay * numbers[i] + (1 - decay) * x
    for numbers, average in zip(expected, ema.averages.values(), strict=True):
        assert average.dtype == torch.float32
        wanted = torch.tensor(numbers, dtype=torch.float64)
        # 200 roundings of float32, of numbers near 1
        torch.testing.assert_close(average.double().flatten(), wanted, atol=2e-6, rtol=0)


def test_a_skipped_step_moves_nothing(model):
    ema, other = Ema(model, 0.9), Ema(model, 0.9)
    skipped, taken = torch.ones(()), torch.zeros(())
    for _ in walk(model, 3):
        ema.update(taken)
        before = {name: each.clone() for name, each in ema.averages.items()}
        ema.update(skipped)
        assert all(torch.equal(each, before[name]) for name, each in ema.averages.items())
        other.update()
    for name, each in other.averages.items():
        torch.testing.assert_close(ema.averages[name], each, atol=1e-6, rtol=1e-6)


@pytest.mark.gpu
def test_kept_on_the_cpu_it_is_the_average_of_a_model_on_the_gpu(model):
    kept = {
        name: Ema(model.to("cuda"), 0.9, device) for name, device in (("gpu", None), ("cpu", "cpu"))
    }
    for _ in walk(model, 5):
        for ema in kept.values():
            ema.update()
    for name, average in kept["cpu"].averages.items():
        beside = kept["gpu"].averages[name]
        assert (average.device.type, beside.device.type) == ("cpu", "cuda")
        torch.testing.assert_close(average, beside.cpu(), atol=1e-6, rtol=0)
    kept["cpu"].copy_to(model)
    assert torch.equal(model[0].weight.cpu(), kept["cpu"].averages["0.weight"])


def test_the_average_is_not_the_model(model):
    ema = Ema(model, 0.5)
    before = ema.averages["0.weight"].clone()
    next(walk(model, 1))
    assert torch.equal(ema.averages["0.weight"], before)
    assert not ema.averages["0.weight"].requires_grad


def test_saved_and_loaded_it_goes_on_bit_by_bit(model, tmp_path):
    ema = Ema(model, 0.9)
    steps = walk(model, 6)
    for _ in range(3):
        next(steps)
        ema.update()
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    other = Ema(model, 0.9)
    other.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    for _ in steps:
        ema.update()
        other.update()
    for name, average in ema.averages.items():
        assert torch.equal(average, other.averages[name])


def test_another_models_averages_are_refused(model):
    ema = Ema(model)
    good = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    for change in (
        {"more": torch.zeros(1)},
        {"0.weight": torch.zeros(3, 3)},
    ):
        with pytest.raises(CheckpointError, match=next(iter(change))):
            ema.load_state_dict(good | change)
    with pytest.raises(CheckpointError, match=r"1\.bias"):
        ema.load_state_dict({name: t for name, t in good.items() if name != "1.bias"})
    with pytest.raises(ConfigError, match="decay"):
        Ema(model, 1.0)


def test_applied_swaps_in_and_out_also_after_an_error(model):
    ema = Ema(model, 0.5)
    next(walk(model, 1))
    raw = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(KeyError), ema.applied(model):
        for parameter, average in zip(model.parameters(), ema.averages.values(), strict=True):
            assert torch.equal(parameter, average)
        raise KeyError
    for parameter, kept in zip(model.parameters(), raw, strict=True):
        assert torch.equal(parameter, kept) and parameter.requires_grad
