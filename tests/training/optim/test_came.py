"""CAME against its paper's Algorithm 2 in float64, number by number and with the paper's sums."""

from __future__ import annotations

import math

import pytest
import torch

from pixart_rt.errors import ConfigError
from pixart_rt.training.optim.came import CAME

Matrix = list[list[float]]


class Paper:
    """Algorithm 2 (arXiv:2307.02047) on one matrix, in Python floats."""

    def __init__(self, weight: Matrix, lr, betas, eps, d, decay) -> None:
        self.w, self.lr, self.betas, self.eps, self.d, self.decay = weight, lr, betas, eps, d, decay
        self.n, self.m = len(weight), len(weight[0])
        self.moment = [[0.0] * self.m for _ in range(self.n)]
        self.r, self.c = [0.0] * self.n, [0.0] * self.m
        self.R, self.C = [0.0] * self.n, [0.0] * self.m

    def factors(self, rows, columns, values: Matrix, beta) -> Matrix:
        """Move the row and column sums towards those of `values`; their outer product, scaled."""
        for i in range(self.n):
            rows[i] = beta * rows[i] + (1 - beta) * sum(values[i])
        for j in range(self.m):
            columns[j] = beta * columns[j] + (1 - beta) * sum(values[i][j] for i in range(self.n))
        total = sum(rows)
        return [[rows[i] * columns[j] / total for j in range(self.m)] for i in range(self.n)]

    def step(self, g: Matrix) -> None:
        beta1, beta2, beta3 = self.betas
        cells = [(i, j) for i in range(self.n) for j in range(self.m)]
        v = self.factors(self.r, self.c, [[x * x + self.eps[0] for x in row] for row in g], beta2)
        u = [[g[i][j] / math.sqrt(v[i][j]) for j in range(self.m)] for i in range(self.n)]
        rms = math.sqrt(sum(u[i][j] ** 2 for i, j in cells) / len(cells))
        u = [[x / max(1.0, rms / self.d) for x in row] for row in u]
        for i, j in cells:
            self.moment[i][j] = beta1 * self.moment[i][j] + (1 - beta1) * u[i][j]
        residual = [
            [(u[i][j] - self.moment[i][j]) ** 2 + self.eps[1] for j in range(self.m)]
            for i in range(self.n)
        ]
        s = self.factors(self.R, self.C, residual, beta3)
        for i, j in cells:
            self.w[i][j] -= self.lr * self.decay * self.w[i][j]
        for i, j in cells:
            self.w[i][j] -= self.lr * self.moment[i][j] / math.sqrt(s[i][j])


SETTINGS = {
    "paper": {"lr": 2e-4, "betas": (0.9, 0.999, 0.9999), "eps": (1e-30, 1e-16), "decay": 0.0},
    "decayed": {"lr": 0.01, "betas": (0.8, 0.95, 0.98), "eps": (0.01, 0.1), "decay": 0.1},
}


def make(parameters, lr, betas, eps, decay, d=1.0):
    return CAME(parameters, lr=lr, betas=betas, eps=eps, weight_decay=decay, clip_threshold=d)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 2)])
@pytest.mark.parametrize("d", [1.0, 0.3])
def test_a_matrix_follows_the_papers_algorithm(shape, settings, d):
    random = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape, generator=random))
    paper = Paper(weight.double().tolist(), d=d, **SETTINGS[settings])
    optimizer = make([weight], d=d, **SETTINGS[settings])
    for step in range(12):
        weight.grad = torch.randn(shape, generator=random) * 10.0 ** (step % 4 - 3)
        paper.step(weight.grad.double().tolist())
        optimizer.step()
    expected = torch.tensor(paper.w, dtype=torch.float64)
    moved = (expected - torch.randn(shape, generator=torch.Generator().manual_seed(0))).abs()
    assert moved.max() > 1e-3
    # 1 - beta3 and u - m lose digits that float32 has not; what is left is a share of the way.
    torch.testing.assert_close(weight.detach().double(), expected, atol=2e-5, rtol=0)


def test_a_vector_has_its_second_moment_in_full_and_no_confidence():
    random = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(9, generator=random))
    expected = weight.detach().double()
    v, m = torch.zeros(2, 9, dtype=torch.float64)
    optimizer = make([weight], **SETTINGS["decayed"])
    for _ in range(10):
        weight.grad = torch.randn(9, generator=random)
        g = weight.grad.double()
        v = 0.95 * v + 0.05 * (g**2 + 0.01)
        u = g / v.sqrt()
        u = u / max(1.0, float((u**2).mean().sqrt()))
        m = 0.8 * m + 0.2 * u
        expected = expected - 0.01 * 0.1 * expected - 0.01 * m
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), expected, atol=1e-6, rtol=0)


def test_a_stack_of_matrices_has_factors_of_its_own():
    """Two matrices in one tensor share only the RMS of the update; without its limit nothing."""
    torch.manual_seed(2)
    stack = torch.nn.Parameter(torch.randn(2, 4, 3))
    alone = [torch.nn.Parameter(each.clone()) for each in stack.detach()]
    optimizers = [make([p], d=1e9, **SETTINGS["decayed"]) for p in (stack, *alone)]
    for _ in range(3):
        stack.grad = torch.randn(2, 4, 3)
        for part, gradient in zip(alone, stack.grad, strict=True):
            part.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in alone]))


def test_memory_is_one_moment_and_four_edges():
    weight = torch.nn.Parameter(torch.randn(30, 50))
    optimizer = CAME([weight])
    weight.grad = torch.randn(30, 50)
    optimizer.step()
    assert sum(each.numel() for each in optimizer.state[weight].values()) == 1500 + 2 * (30 + 50)


def test_saved_and_loaded_it_goes_on_bit_by_bit(tmp_path):
    torch.manual_seed(3)
    weights = [torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    gradients = torch.randn(6, 4, 3)
    one, other = (CAME([weight], lr=0.1) for weight in weights)
    for gradient in gradients[:3]:
        weights[0].grad = gradient
        one.step()
    torch.save(one.state_dict(), tmp_path / "came.pt")
    other.load_state_dict(torch.load(tmp_path / "came.pt", weights_only=True))
    weights[1].data.copy_(weights[0].data)
    for gradient in gradients[3:]:
        for weight, optimizer in zip(weights, (one, other), strict=True):
            weight.grad = gradient
            optimizer.step()
    assert torch.equal(*weights)


def test_bfloat16_weights_keep_float32_moments():
    weight = torch.nn.Parameter(torch.randn(4, 3).bfloat16())
    optimizer = CAME([weight], lr=0.5)
    weight.grad = torch.randn(4, 3).bfloat16()
    before = weight.detach().clone()
    optimizer.step()
    assert all(each.dtype == torch.float32 for each in optimizer.state[weight].values())
    assert weight.dtype == torch.bfloat16 and not torch.equal(weight, before)


@pytest.mark.parametrize(
    "wrong", [{"betas": (0.9, 0.999)}, {"betas": (0.9, 0.999, 1.0)}, {"lr": -1.0},
              {"clip_threshold": 0.0}, {"weight_decay": -0.1}, {"eps": (-1.0, 0.0)}]
)  # fmt: skip
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ConfigError, match="CAME"):
        CAME([torch.nn.Parameter(torch.zeros(1))], **wrong)
