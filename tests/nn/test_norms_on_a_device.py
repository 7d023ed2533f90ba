"""Norm layers on arrays that refuse every implicit conversion, which stand in for a GPU's.

What waits for the device, `if count > 0:` or `int(counter)`, raises there. Results are the CPU's.
"""

import numpy as np
import pytest

import tinygrad_bn as tg
from tests.backend.conftest import strict_gpu  # noqa: F401
from tests.backend.strict_array import StrictArray
from tinygrad_bn import nn

X = np.random.default_rng(0).normal(3, 2, (6, 4, 5)).astype("float32")
MASK = np.array([1, 1, 1, 0, 0, 1], "float32").reshape(6, 1, 1)

LAYERS = [
    (lambda: nn.BatchNorm1d(4), False),
    (lambda: nn.BatchNorm1d(4), True),
    (lambda: nn.BatchNorm1d(4, momentum=None, groups=2), True),
    (lambda: nn.BatchNorm1d(4, momentum=None, convention="keras", axis=1), False),
    (lambda: nn.BatchNorm1d(4, groups=3, center=False), False),
    (lambda: nn.BatchRenorm(4, warmup=None), False),
    (lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True), False),
    (lambda: nn.GroupNorm(2, 4), False),
    (lambda: nn.LayerNorm((4, 5)), False),
    (lambda: nn.RMSNorm(5), False),
]


#: The second GPU is not the current device.
on_each_gpu = pytest.mark.parametrize("gpu", ["cuda:0", "cuda:1"])


@on_each_gpu
@pytest.mark.parametrize(("make", "masked"), LAYERS)
def test_a_step_never_waits_and_gives_what_the_cpu_gives(make, masked, gpu, strict_gpu):  # noqa: F811
    layers = make(), make().to(gpu)
    results = []
    for layer, device in zip(layers, ("cpu", gpu), strict=True):
        x = tg.Tensor(X).to(device).requires_grad_()
        options = {"mask": tg.Tensor(MASK).to(device)} if masked else {}
        for _ in range(2):
            y = layer(x, **options)
        (y**2 * y.detach().exp()).sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    for a, b in zip(*results, strict=True):
        assert type(b.data) is StrictArray
        # Other sums of the same terms, in float32.
        np.testing.assert_allclose(b.numpy(), a.numpy(), rtol=2e-5, atol=2e-4)


class Masked(nn.Module):
    def __init__(self, bn, mask):
        self.bn, self.mask = bn, mask

    def forward(self, x):
        return self.bn(x, self.mask)


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_folding_converting_and_population_statistics(device, strict_gpu):  # noqa: F811
    tg.manual_seed(0)
    cpu = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    gpu = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).to(device)
    gpu.load_state_dict(cpu.state_dict())
    rows = X.reshape(-1, 5)
    for model, x in ((cpu, tg.Tensor(rows)), (gpu, tg.Tensor(rows).to(device))):
        nn.update_batch_norm(model, [x[:7], x[7:]])
        model[1].convert("keras", count=12)
    for (name, a), b in zip(cpu.state_dict().items(), gpu.state_dict().values(), strict=True):
        np.testing.assert_allclose(b.numpy(), a.numpy(), rtol=1e-6, err_msg=name)
    masked = nn.BatchNorm1d(4, groups=2).to(device)
    expected = nn.BatchNorm1d(4, groups=2)
    for bn, where in ((masked, device), (expected, "cpu")):
        several = Masked(bn, tg.Tensor(MASK).to(where))
        nn.update_batch_norm(several, [tg.Tensor(X).to(where)] * 2)
    for a, b in zip(masked.buffers(), expected.buffers(), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-6)
    folded = nn.fold_batch_norm(gpu)
    assert type(folded[0].weight.data) is StrictArray
    expected = nn.fold_batch_norm(cpu)(tg.Tensor(rows)).numpy()
    got = folded(tg.Tensor(rows).to(device)).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
