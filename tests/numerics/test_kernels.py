"""Attention, activations and the low-rank product against torch's own functions, in value and in every
derivative that a hypergradient takes.

Shape letters: L queries, M keys, E width of a head, T tasks, R rank.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from metaloom.engine import kernels
from metaloom.engine.kernels.linear import product_flops
from metaloom.engine.kernels.low_rank import low_rank_update
from metaloom.engine.recomputation import recomputed
from metaloom.errors import CapabilityError
from tests.numerics.problems import relative_error

Function = Callable[..., Tensor]

# The package's function has the module's name.
module = importlib.import_module("metaloom.engine.kernels.attention")

# Rounding of sums of a few dozen float64 products, in another order.
RTOL, ATOL = 1e-11, 1e-13


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(function: Function, inputs: Sequence[Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
    """d <c, f> by every input."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    return torch.autograd.grad((function(*leaves) * cotangent).sum(), leaves)


def reverse_over_reverse(
    function: Function, inputs: Sequence[Tensor], cotangent: Tensor, directions: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The derivative of <u, d<c, f>/dx> by every input, and by c."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    c = cotangent.detach().requires_grad_()
    grads = torch.autograd.grad((function(*leaves) * c).sum(), leaves, create_graph=True)
    slope = sum((g * u).sum() for g, u in zip(grads, directions, strict=True))
    assert isinstance(slope, Tensor)
    return torch.autograd.grad(slope, [*leaves, c], materialize_grads=True, allow_unused=True)


def forward_over_reverse(
    function: Function,
    inputs: Sequence[Tensor],
    cotangent: Tensor,
    directions: Sequence[Tensor | None],
    cotangent_direction: Tensor | None,
) -> tuple[Tensor, ...]:
    """f, d<c, f>/dx, and their tangents where some of x (and perhaps c) are dual numbers."""
    with forward_ad.dual_level():

        def dual(primal: Tensor, tangent: Tensor | None) -> Tensor:
            if tangent is None:
                return primal
            made: Tensor = forward_ad.make_dual(primal, tangent)  # type: ignore[no-untyped-call]
            return made

        leaves = [
            dual(tensor.detach().clone().requires_grad_(), u)
            for tensor, u in zip(inputs, directions, strict=True)
        ]
        output = function(*leaves)
        grads = torch.autograd.grad((output * dual(cotangent, cotangent_direction)).sum(), leaves)
        pairs = [
            forward_ad.unpack_dual(value)  # type: ignore[no-untyped-call]
            for value in (output, *grads)
        ]
        return tuple(
            part.detach()
            for primal, tangent in pairs
            for part in (primal, torch.zeros_like(primal) if tangent is None else tangent)
        )


def assert_all_close(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert bool(other.isfinite().all())
        torch.testing.assert_close(one, other, rtol=RTOL, atol=ATOL)


def assert_same_derivatives(
    function: Function,
    oracle: Function,
    inputs: Sequence[Tensor],
    *,
    oracle_in_dual_numbers: Function | None = None,
) -> None:
    """Value, gradient, and second derivatives in both modes, all inputs active and each alone."""
    cotangent = random(*oracle(*inputs).shape, seed=100)
    directions = [random(*tensor.shape, seed=200 + i) for i, tensor in enumerate(inputs)]
    assert_all_close([function(*inputs)], [oracle(*inputs)])
    assert_all_close(gradient(function, inputs, cotangent), gradient(oracle, inputs, cotangent))
    assert_all_close(
        reverse_over_reverse(function, inputs, cotangent, directions),
        reverse_over_reverse(oracle, inputs, cotangent, directions),
    )
    moved = random(*cotangent.shape, seed=300)
    nothing: list[Tensor | None] = [None] * len(inputs)
    each_alone = [
        [u if i == active else None for i, u in enumerate(directions)] for active in range(len(inputs))
    ]
    together: list[Tensor | None] = list(directions)
    cases = [(together, None), (together, moved), (nothing, moved)]
    for which, of_cotangent in [*cases, *((alone, None) for alone in each_alone)]:
        assert_all_close(
            forward_over_reverse(function, inputs, cotangent, which, of_cotangent),
            forward_over_reverse(oracle_in_dual_numbers or oracle, inputs, cotangent, which, of_cotangent),
        )


# --- attention ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and options of an attention: heads of queries and keys, L, M, widths of Q and of V."""

    heads: tuple[int, int] = (2, 2)
    lengths: tuple[int, int] = (7, 7)
    widths: tuple[int, int] = (4, 4)
    mask: Tensor | None = None
    options: tuple[tuple[str, Any], ...] = ()

    def tensors(self) -> list[Tensor]:
        (H, G), (L, M), (E, V) = self.heads, self.lengths, self.widths
        return [random(2, H, L, E, seed=1), random(2, G, M, E, seed=2), random(2, G, M, V, seed=3)]

    def of(self, function: Function) -> Function:
        options = dict(self.options)
        return lambda q, k, v: function(q, k, v, self.mask, **options)


def lower_with_a_blind_query(num_queries: int, num_keys: int) -> Tensor:
    """Row 2 may look at nothing, and row 5 at one key."""
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool).tril()
    mask[2] = False
    mask[5, 1:] = False
    return mask


def padding(num_keys: int) -> Tensor:
    """One row for all queries, another for each of two sequences: `[2, 1, 1, M]`."""
    kept = torch.tensor([num_keys, num_keys - 3])
    return (torch.arange(num_keys) < kept[:, None])[:, None, None]


def biases() -> Tensor:
    mask = random(7, 7, seed=4)
    mask[3, 4:] = -math.inf
    mask[6] = -math.inf
    return mask


CAUSAL = (("is_causal", True),)
CASES = {
    "no mask": Case(),
    "causal": Case(options=CAUSAL),
    "causal, more queries than keys": Case(lengths=(9, 5), options=CAUSAL),
    "causal, more keys than queries": Case(lengths=(5, 8), options=CAUSAL),
    "boolean mask with a query that sees nothing": Case(mask=lower_with_a_blind_query(7, 7)),
    "padding, the same for all queries": Case(mask=padding(7)),
    "mask of numbers with -inf, one query sees nothing": Case(mask=biases()),
    "mask of numbers per head": Case(mask=random(2, 2, 7, 7, seed=5)),
    "scale": Case(options=(("scale", 0.3),)),
    "wider values, fewer queries than keys": Case(lengths=(4, 9), widths=(3, 6)),
    "narrower values, more queries than keys": Case(lengths=(9, 4), widths=(5, 2)),
    "grouped heads": Case(heads=(4, 2), options=(*CAUSAL, ("enable_gqa", True))),
    "one head of keys": Case(heads=(3, 1), mask=padding(7), options=(("enable_gqa", True),)),
}


@pytest.fixture(params=[3, 64], ids=["chunks of 3", "one chunk"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three queries at a time: two full chunks and a ragged one, for seven."""
    monkeypatch.setattr(module, "CHUNK_CPU", request.param)


def in_mathematics(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Torch's own, from elementary operations, whose derivatives are autograd's."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, *args, **kwargs)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("name", CASES)
def test_attention_equals_torchs_in_value_and_first_and_second_derivatives(name: str) -> None:
    case = CASES[name]
    assert_same_derivatives(case.of(kernels.attention), case.of(in_mathematics), case.tensors())


@pytest.mark.parametrize("name", CASES)
def test_written_out_attention_equals_torchs_in_value_and_first_and_second_derivatives(name: str) -> None:
    case = CASES[name]
    assert_same_derivatives(case.of(kernels.written_out_attention), case.of(in_mathematics), case.tensors())


@pytest.mark.usefixtures("_chunks")
def test_attention_of_transposed_and_expanded_inputs_equals_that_of_contiguous_ones() -> None:
    def split(hidden: Tensor) -> tuple[Tensor, ...]:
        # As a model's fused projection gives them: [N, L, H, E] seen as [N, H, L, E].
        return tuple(part.view(2, 7, 2, 4).transpose(1, 2) for part in torch.split(hidden, 8, dim=-1))

    def apply(function: Function) -> Function:
        def applied(hidden: Tensor, key: Tensor) -> Tensor:
            query, _, value = split(hidden)
            return function(query, key.expand(2, 2, 7, 4), value, is_causal=True).transpose(1, 2).flatten(2)

        return applied

    inputs = [random(2, 7, 24, seed=1), random(1, 1, 7, 4, seed=2)]
    assert_same_derivatives(apply(kernels.attention), apply(in_mathematics), inputs)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("name", ["causal", "wider values, fewer queries than keys"])
def test_attentions_second_derivative_is_that_of_finite_differences(name: str) -> None:
    case = CASES[name]
    inputs = tuple(tensor.requires_grad_() for tensor in case.tensors())
    assert torch.autograd.gradgradcheck(case.of(kernels.attention), inputs, fast_mode=True)
    assert torch.autograd.gradcheck(case.of(kernels.attention), inputs, fast_mode=True)


def test_a_part_of_the_inputs_may_need_no_gradient() -> None:
    case = CASES["causal"]
    q, k, v = case.tensors()
    wanted = gradient(case.of(in_mathematics), (q, k, v), torch.ones_like(q))
    for position in range(3):
        tensors = [t.requires_grad_(i == position) for i, t in enumerate(case.tensors())]
        output = case.of(kernels.attention)(*tensors).sum()
        assert_all_close(torch.autograd.grad(output, tensors[position]), [wanted[position]])


def test_attention_under_bfloat16_autocast_is_within_3_percent_of_float64() -> None:
    def double_backward(dtype: torch.dtype, autocast: torch.dtype | None) -> list[Tensor]:
        inputs = [tensor.to(dtype).requires_grad_() for tensor in CASES["causal"].tensors()]
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            output = kernels.attention(inputs[0], inputs[1], inputs[2], is_causal=True)
        (grad,) = torch.autograd.grad(output.square().sum(), inputs[:1], create_graph=True)
        return [output, grad, *torch.autograd.grad(grad.square().sum(), inputs)]

    rounded = double_backward(torch.float32, torch.bfloat16)
    exact = double_backward(torch.float64, None)
    assert rounded[0].dtype == torch.bfloat16
    for one, other in zip(rounded, exact, strict=True):
        # Eight bits: each of a handful of roundings costs up to 0.4 %, 0.9 % was measured.
        assert 1e-4 < relative_error(one.detach().double(), other.detach()) < 0.03


class SeenShapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the shapes of all tensors that torch's operations take and give."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, result))
        self.shapes |= {tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)}
        return result


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_no_tensor_of_a_double_backward_pass_is_quadratic_in_the_length(
    mode: str, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    L, C = 50, 8
    monkeypatch.setattr(module, "CHUNK_CPU", C)
    inputs = [random(2, 2, L, 4, seed=seed) for seed in (1, 2, 3)]
    directions = [random(2, 2, L, 4, seed=seed) for seed in (4, 5, 6)]
    cotangent = random(2, 2, L, 4, seed=7)

    def largest(function: Function) -> int:
        with SeenShapes() as seen:
            if mode == "reverse":
                reverse_over_reverse(function, inputs, cotangent, directions)
            else:
                forward_over_reverse(function, inputs, cotangent, list(directions), None)
        return int(max(math.prod(shape) for shape in seen.shapes))

    assert largest(lambda q, k, v: kernels.attention(q, k, v, is_causal=is_causal)) <= 2 * 2 * C * L
    assert largest(lambda q, k, v: in_mathematics(q, k, v, is_causal=is_causal)) >= 2 * 2 * L * L


@pytest.mark.parametrize("function", [kernels.attention, kernels.written_out_attention])
def test_attention_refuses_dropout_and_two_masks(function: Function) -> None:
    q, k, v = Case().tensors()
    with pytest.raises(CapabilityError, match=r"attention dropout \(0\.1\) .* cannot be replayed"):
        function(q, k, v, dropout_p=0.1)
    with pytest.raises(CapabilityError, match="both is_causal=True and a mask"):
        function(q, k, v, lower_with_a_blind_query(7, 7), is_causal=True)


def test_attention_refuses_a_mask_that_is_learned() -> None:
    q, k, v = Case().tensors()
    with pytest.raises(CapabilityError, match="this attention mask requires gradients"):
        kernels.attention(q, k, v, random(7, 7, seed=1).requires_grad_())


# --- activations -------------------------------------------------------------------------------------------


def gelu_from_elementary(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def gelu_tanh_from_elementary(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def silu_from_elementary(x: Tensor) -> Tensor:
    return x / (1.0 + torch.exp(-x))


ACTIVATIONS: dict[str, tuple[Function, Function]] = {
    "gelu": (kernels.gelu, gelu_from_elementary),
    "gelu by tanh": (lambda x: kernels.gelu(x, approximate="tanh"), gelu_tanh_from_elementary),
    "silu": (kernels.silu, silu_from_elementary),
    "silu written out": (kernels.written_out_silu, silu_from_elementary),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_equals_its_elementary_form_in_value_and_first_and_second_derivatives(
    name: str,
) -> None:
    function, oracle = ACTIVATIONS[name]
    # Both tails, and zero.
    x = torch.cat([2.0 * random(3, 11, seed=1).flatten(), torch.tensor([-9.0, -1e-9, 0.0, 1e-9, 9.0])])
    assert_same_derivatives(function, oracle, [x.view(2, 19)])


@pytest.mark.parametrize("name", ["gelu", "gelu by tanh", "silu"])
def test_an_activation_leaves_its_input_and_cotangent_as_they_were(name: str) -> None:
    function, _ = ACTIVATIONS[name]
    x, cotangent, direction = (random(5, seed=seed) for seed in (1, 2, 3))
    before = [tensor.clone() for tensor in (x, cotangent, direction)]
    reverse_over_reverse(function, [x], cotangent, [direction])
    forward_over_reverse(function, [x], cotangent, [direction], cotangent)
    for now, then in zip((x, cotangent, direction), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("name", ["gelu", "gelu by tanh", "silu"])
def test_an_activation_of_a_transposed_input_equals_that_of_a_contiguous_one(name: str) -> None:
    function, oracle = ACTIVATIONS[name]
    assert_same_derivatives(lambda x: function(x.mT), lambda x: oracle(x.mT), [random(3, 5, seed=1)])


def test_silu_never_works_in_place() -> None:
    x = random(4, seed=1)
    before = x.clone()
    kernels.silu(x, inplace=True)
    assert torch.equal(x, before)


# --- low-rank product --------------------------------------------------------------------------------------

T, ROWS, D, D_OUT, R = 3, 6, 5, 4, 2


def low_rank_by_einsum(output: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return output + 1.7 * torch.einsum("tmd,trd,tor->tmo", x, a, b)


def test_the_low_rank_update_equals_an_einsum_in_value_and_first_and_second_derivatives() -> None:
    inputs = [
        random(T, ROWS, D_OUT, seed=1),
        random(T, ROWS, D, seed=2),
        random(T, R, D, seed=3),
        random(T, D_OUT, R, seed=4),
    ]
    assert_same_derivatives(lambda o, x, a, b: low_rank_update(o, x, a, b, 1.7), low_rank_by_einsum, inputs)


def test_the_low_rank_update_of_strided_inputs_equals_an_einsum() -> None:
    inputs = [random(T, D_OUT, ROWS, seed=1), random(ROWS, T, D, seed=2), random(R, D, seed=3)]
    b = random(T, R, D_OUT, seed=4)

    def apply(function: Function) -> Function:
        return lambda o, x, a: function(o.mT, x.transpose(0, 1), a.expand(T, R, D), b.mT)

    assert_same_derivatives(
        apply(lambda o, x, a, b: low_rank_update(o, x, a, b, 1.7)), apply(low_rank_by_einsum), inputs
    )


def test_the_low_rank_update_passes_finite_differences_twice() -> None:
    inputs = tuple(
        random(*shape, seed=seed).requires_grad_()
        for seed, shape in enumerate([(2, 3, 2), (2, 3, 4), (2, 1, 4), (2, 2, 1)])
    )
    assert torch.autograd.gradgradcheck(lambda o, x, a, b: low_rank_update(o, x, a, b, 0.5), inputs)


# --- under vmap --------------------------------------------------------------------------------------------


def test_written_out_forms_run_under_vmap() -> None:
    q, k, v = (random(3, 2, 5, 4, seed=seed) for seed in (1, 2, 3))
    each = [kernels.written_out_attention(q[i], k[i], v[i], is_causal=True) for i in range(3)]
    together = vmap(lambda q, k, v: kernels.written_out_attention(q, k, v, is_causal=True))(q, k, v)
    assert_all_close(list(together), each)
    assert_all_close([vmap(kernels.written_out_silu)(q)], [silu_from_elementary(q)])


@pytest.mark.parametrize("through", ["attention", "gelu", "recomputed"])
def test_a_third_derivative_is_refused(through: str) -> None:
    x = torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    value = {
        "attention": lambda: kernels.attention(x, x, x),
        "gelu": lambda: kernels.gelu(x),
        "recomputed": lambda: recomputed(lambda y: (y.sin(),), (x,), derivative="reverse")[0],
    }[through]()
    (first,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
    with pytest.raises(CapabilityError, match="a third derivative is taken"):
        torch.autograd.grad(first.square().sum(), x, create_graph=True)


def test_an_unknown_approximation_of_gelu_is_torchs_own_error() -> None:
    with pytest.raises(RuntimeError, match="approximate"):
        kernels.gelu(torch.ones(2), "tahn")


def big(*shape: int, seed: int) -> Tensor:
    """Numbers in float32: `linear` is another kernel in float32 alone, and for large products."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("frozen", ["nothing", "weight", "inputs"])
def test_a_linear_layer_equals_torchs_in_every_derivative(has_bias: bool, frozen: str) -> None:
    values = {"inputs": big(4, 32, 64, seed=1), "weight": big(96, 64, seed=2), "bias": big(96, seed=3)}
    learned = [name for name in values if name != frozen and (has_bias or name != "bias")]
    directions = {name: big(*values[name].shape, seed=4 + len(name)) for name in learned}

    def derivatives(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        tensors = {name: value.to(dtype).requires_grad_(name in learned) for name, value in values.items()}
        output = function(tensors["inputs"], tensors["weight"], tensors["bias"] if has_bias else None)
        inputs = [tensors[name] for name in learned]
        first = torch.autograd.grad(output.sin().sum(), inputs, create_graph=True)
        terms = [(grad * directions[name]).sum() for name, grad in zip(learned, first, strict=True)]
        slope = torch.stack(terms).sum()
        second = torch.autograd.grad(slope, inputs)
        with forward_ad.dual_level():
            duals = dict(tensors)
            for name in learned:
                primal, tangent = tensors[name].detach().requires_grad_(), directions[name].to(dtype)
                duals[name] = forward_ad.make_dual(primal, tangent)  # type: ignore[no-untyped-call]
            output = function(duals["inputs"], duals["weight"], duals["bias"] if has_bias else None)
            grads = torch.autograd.grad(output.sin().sum(), [duals[name] for name in learned])
            unpacked = [forward_ad.unpack_dual(grad) for grad in grads]  # type: ignore[no-untyped-call]
            forward = [pair.tangent for pair in unpacked]
        return [output.detach(), *(grad.detach() for grad in first), *second, *forward]

    found = derivatives(kernels.linear, torch.float32)
    expected = derivatives(F.linear, torch.float64)
    for one, other in zip(found, expected, strict=True):
        # float32's rounding of 6e-8, over sums of up to 128 products.
        assert relative_error(one.double(), other) < 2e-6


def test_a_linear_layer_takes_expanded_and_transposed_gradients() -> None:
    weight, inputs = big(64, 128, seed=1).requires_grad_(), big(128, 64, seed=2).t()
    total = kernels.linear(inputs, weight).sum()  # whose gradient is one number, expanded
    (gradient,) = torch.autograd.grad(total, weight)
    torch.testing.assert_close(gradient, inputs.sum(0).expand(64, -1), rtol=1e-5, atol=1e-4)


def test_the_operations_of_a_large_product_are_counted() -> None:
    with FlopCounterMode(display=False, custom_mapping=product_flops()) as counter:
        kernels.linear(big(128, 64, seed=1), big(96, 64, seed=2))
    assert counter.get_total_flops() == 2 * 128 * 64 * 96


@pytest.mark.skipif(not product_flops(), reason="linear layers are torch's own on this processor")
def test_what_has_no_tangent_takes_no_product() -> None:
    """A frozen layer under dual numbers: the value and its tangent, forwards and backwards."""
    one_product = 2 * 128 * 64 * 96
    with (
        FlopCounterMode(display=False, custom_mapping=product_flops()) as counter,
        forward_ad.dual_level(),
    ):
        inputs = forward_ad.make_dual(big(128, 64, seed=1).requires_grad_(), big(128, 64, seed=3))  # type: ignore[no-untyped-call]
        output = kernels.linear(inputs, big(96, 64, seed=2))
        torch.autograd.grad(output.square().sum(), [inputs])
    assert counter.get_total_flops() == 4 * one_product


def test_what_has_no_gradient_is_passed_on_as_none() -> None:
    class Deaf(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> None:
            return None

    for through in (
        lambda x: kernels.linear(x, big(64, 64, seed=2)),
        kernels.gelu,
        lambda x: kernels.attention(x[None], x[None], x[None]),
        lambda x: low_rank_update(x[None], x[None], x[None, :2], x[None, :, :2], 1.0),
    ):
        x = big(64, 64, seed=1).requires_grad_()
        heard: Tensor = Deaf.apply(through(x))  # type: ignore[no-untyped-call]
        (gradient,) = torch.autograd.grad(heard.sum(), [x], allow_unused=True)
        assert gradient is None


def test_gradients_of_a_linear_layer_are_laid_out_as_what_they_are_gradients_of() -> None:
    """Also in second derivatives, whose products are of transposed matrices."""
    inputs, weight = big(128, 64, seed=1).requires_grad_(), big(96, 64, seed=2).requires_grad_()
    d_output = big(128, 96, seed=3).requires_grad_()
    directions = big(128, 64, seed=4), big(96, 64, seed=5)
    output = kernels.linear(inputs, weight)
    first = torch.autograd.grad(output, [inputs, weight], d_output, create_graph=True)
    second = torch.autograd.grad(first, [inputs, weight, d_output], directions)
    assert all(gradient.is_contiguous() for gradient in (*first, *second))
    expected = [
        d_output @ directions[1],
        d_output.T @ directions[0],
        directions[0] @ weight.T + inputs @ directions[1].T,
    ]
    for one, other in zip(second, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
