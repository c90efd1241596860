import copy
import pickle

import pytest
import torch

from benchmarks.counter import as_on_a_gpu
from fastjepa.nn import MLP, Linear, keep_copies, set_fp8
from fastjepa.optim import AdamWEMA

CPU = {"device_type": "cpu", "dtype": torch.bfloat16}


def pair(bias: bool = True) -> tuple[Linear, torch.nn.Linear, torch.Tensor]:
    ours = Linear(6, 5, bias=bias)
    stock = torch.nn.Linear(6, 5, bias=bias)
    stock.load_state_dict(ours.state_dict())
    return ours, stock, torch.randn(7, 6)


def step(layer, x):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast(**CPU):
        y = layer(x)
    y.float().square().sum().backward()
    return y, x.grad, [p.grad for p in layer.parameters()]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6), (0, 6)])
def test_copies_give_what_autocast_gives(bias: bool, shape):
    ours, stock, _ = pair(bias)
    assert len(keep_copies(ours)) == 1 + bias
    x = torch.randn(shape)
    found, wanted = step(ours, x), step(stock, x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0 if not bias else 1e-1)
    assert found[0].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in found[2])


def test_bias_gradients_are_summed_in_fp32():
    ours, _, _ = pair()
    keep_copies(ours)
    x = torch.randn(3000, 6)
    _, _, (_, db) = step(ours, x)
    with torch.autocast(**CPU):
        y = ours(x)
    exact = (2 * y.double()).bfloat16().double().sum(0)
    torch.testing.assert_close(db.double(), exact, rtol=1e-5, atol=1e-3)


def test_without_autocast_the_weights_are_taken():
    ours, stock, x = pair()
    keep_copies(ours)
    torch.testing.assert_close(ours(x), stock(x), rtol=0, atol=0)
    with torch.autocast("cpu", torch.float16):
        torch.testing.assert_close(ours(x), stock(x), rtol=0, atol=0)


@pytest.mark.parametrize("change", ["in place", "load_state_dict", "data"])
def test_a_copy_that_is_behind_is_not_taken(change: str):
    ours, stock, x = pair()
    keep_copies(ours)
    new = {name: torch.randn_like(value) for name, value in stock.state_dict().items()}
    stock.load_state_dict(new)
    with torch.no_grad():
        if change == "in place":
            for name, parameter in ours.named_parameters():
                parameter.copy_(new[name])
        elif change == "load_state_dict":
            ours.load_state_dict(new)
        else:
            ours.weight, ours.bias = (torch.nn.Parameter(new[name]) for name in ("weight", "bias"))
            for parameter in ours.parameters():
                parameter.add_(0)
    with torch.autocast(**CPU):
        torch.testing.assert_close(ours(x), stock(x), rtol=0, atol=0)


def test_the_optimizer_keeps_copies_current(monkeypatch):
    ours, stock, x = pair()
    copies = keep_copies(ours)
    ours_opt = AdamWEMA(ours.parameters(), lr=0.1, low_precision=copies)
    stock_opt = torch.optim.AdamW(stock.parameters(), lr=0.1)
    casts = []
    real = torch.Tensor.to
    for _ in range(3):
        found, wanted = step(ours, x), step(stock, x)
        torch.testing.assert_close(found[0], wanted[0], rtol=0.05, atol=0.05)
        ours_opt.step()
        stock_opt.step()
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *a, **k: (casts.append(t), real(t, *a, **k))[1])
    with torch.autocast(**CPU):
        ours(x)
    assert all(t is x for t in casts)
    for parameter, copy_ in copies.items():
        torch.testing.assert_close(copy_, parameter.detach().bfloat16(), rtol=0, atol=0)


def test_copies_stay_with_their_instance():
    ours, _, x = pair()
    keep_copies(ours)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other.copies is None
        with torch.autocast(**CPU):
            torch.testing.assert_close(other(x), ours(x), rtol=0, atol=0)
    assert set(ours.state_dict()) == {"weight", "bias"}
    assert ours.copies is not None


def test_half_models_need_none():
    assert keep_copies(Linear(2, 2).bfloat16()) == {}


def test_graphs_take_the_weights():
    ours, stock, x = pair()
    keep_copies(ours)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    with torch.autocast(**CPU):
        torch.testing.assert_close(compiled(x), stock(x), rtol=0, atol=0)


def in_fp8(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), torch.autocast(**CPU):
        return layer(x)


def test_fp8_is_for_products_without_gradients_under_bf16():
    ours, stock, x = pair()
    assert set_fp8(ours) == 1
    assert keep_copies(ours) == {}
    torch.testing.assert_close(ours(x), stock(x), rtol=0, atol=0)
    torch.testing.assert_close(step(ours, x), step(stock, x), rtol=0, atol=0)
    y, exact = in_fp8(ours, x), stock(x)
    assert y.dtype == torch.bfloat16
    assert 0 < (y - exact).norm() < 0.08 * exact.norm()
    assert in_fp8(ours, x.view(1, 7, 6)).shape == (1, 7, 5)
    assert in_fp8(ours, x[:0]).shape == (0, 5)
    set_fp8(ours, False)
    torch.testing.assert_close(in_fp8(ours, x), in_fp8(stock, x), rtol=0, atol=0)


@pytest.mark.parametrize("change", ["in place", "optimizer", "load_state_dict"])
def test_fp8_sees_that_a_weight_has_changed(change: str):
    ours, stock, x = pair()
    set_fp8(ours)
    before = in_fp8(ours, x)
    held = ours.quantised
    assert torch.equal(in_fp8(ours, x), before)
    assert ours.quantised is held
    if change == "in place":
        with torch.no_grad():
            ours.weight.mul_(2)
    elif change == "load_state_dict":
        ours.load_state_dict({name: 2 * p for name, p in stock.state_dict().items()})
    else:  # as the target of a step of the optimizer, which moves it all the way
        source = torch.nn.Parameter(2 * ours.weight.detach())
        source.grad = torch.zeros_like(source)
        AdamWEMA(
            [source], lr=0.0, weight_decay=0.0, target_params=[ours.weight.requires_grad_(False)], momentum=0.0
        ).step()
    bias = 0 if change != "load_state_dict" else ours.bias / 2
    torch.testing.assert_close(
        in_fp8(ours, x).float() - ours.bias, 2 * (before.float() - ours.bias + bias), rtol=0.02, atol=0.05
    )


def test_fp8_weights_do_not_travel():
    ours, _, x = pair()
    set_fp8(ours)
    wanted = in_fp8(ours, x)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other.quantised is None
        assert torch.equal(in_fp8(other, x), wanted)


# The product behind a GELU, whose input is not kept.


# The MLP, whose parts may be other people's.


class Doubled(Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("part", ["fc1", "fc2"])
@pytest.mark.parametrize("how", ["subclass", "instance", "stock"])
def test_an_mlp_calls_parts_that_are_not_ours(part: str, how: str):
    mlp, x = MLP(16, 32), torch.randn(5, 16)
    old = getattr(mlp, part)
    if how == "instance":
        forward = old.forward
        old.forward = lambda x: 2 * forward(x)
    else:
        new = (Doubled if how == "subclass" else torch.nn.Linear)(old.in_features, old.out_features)
        new.load_state_dict(old.state_dict())
        setattr(mlp, part, new)
    with as_on_a_gpu():
        found = mlp(x)
    torch.testing.assert_close(found, mlp(x))


def test_an_mlp_drops_where_its_dropout_does():
    mlp, x = MLP(16, 32, drop=0.5), torch.randn(200, 16)
    seen: list[torch.Tensor] = []
    mlp.eval()
    with as_on_a_gpu():
        torch.testing.assert_close(mlp(x), mlp(x))
        mlp.drop.train()
        assert 0.4 < (mlp(x) == 0).float().mean() < 0.6
        mlp.drop.eval()
        mlp.drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
        mlp(x)
        assert [list(tensor.shape) for tensor in seen] == [[200, 32], [200, 16]]
        mlp.drop = torch.nn.Identity()
        mlp.train()
        mlp(x).sum().backward()
    assert mlp.fc2.weight.grad is not None
