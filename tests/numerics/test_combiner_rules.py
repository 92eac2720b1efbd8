"""Rules that combine tasks' gradients, against the equations on the gradients themselves.

Shape letters: T tasks, P numbers of a gradient.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from metaloom.engine.combiners.base import (
    Combined,
    Combiner,
    GroupWeights,
    TaskRecord,
    TaskRule,
    weight_metrics,
)
from metaloom.engine.combiners.cosines import conflict_metrics, step_cosines
from metaloom.engine.combiners.dwa import DWA
from metaloom.engine.combiners.even import Even
from metaloom.engine.combiners.gradnorm import GradNorm
from metaloom.engine.combiners.gram import gram_matrix
from metaloom.engine.combiners.group_dro import GroupDRO
from metaloom.engine.combiners.mgda import MGDA, shortest
from metaloom.engine.combiners.pcgrad import PCGrad, surgery
from metaloom.engine.combiners.per_task import PerTask
from metaloom.engine.combiners.q_ffl import QFFL
from metaloom.engine.combiners.uncertainty import Uncertainty
from metaloom.engine.combiners.upweighting import Upweighting
from metaloom.engine.combiners.weighted import Weighted
from metaloom.engine.hypergradients.base import MetaGradient
from metaloom.engine.learner import TaskBatch
from metaloom.engine.sharding.replicated import Replicated


def vectors(num_tasks: int, size: int = 5, seed: int = 0) -> Tensor:
    """`[T, P]`, some of which conflict."""
    return torch.randn(num_tasks, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def records(losses: Sequence[float], groups: str | None = None, first: int = 0) -> list[TaskRecord]:
    names = [None] * len(losses) if groups is None else list(groups)
    return [
        TaskRecord(first + place, group, loss)
        for place, (group, loss) in enumerate(zip(names, losses, strict=True))
    ]


def reloaded(state: dict[str, object]) -> dict[str, object]:
    """As a checkpoint gives it back."""
    result: dict[str, object] = json.loads(json.dumps(state))
    return result


# ---------------------------------------------------------------- inner products


@pytest.mark.parametrize("chunk_numbers", [1, 7, 12, 1000])
def test_inner_products_do_not_depend_on_the_size_of_chunks(chunk_numbers: int) -> None:
    flat = vectors(3, 11)
    like = {"a": torch.zeros(2, 3), "b": torch.zeros(()), "c": torch.zeros(4)}
    gradients = {
        task: {"a": row[:6].view(2, 3), "b": row[6].clone(), "c": row[7:]} for task, row in enumerate(flat)
    }
    found = gram_matrix(gradients, like, [0, 0, 0], Replicated(), chunk_numbers=chunk_numbers)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, flat @ flat.T, rtol=1e-14, atol=1e-14)


def test_conflicts_are_counted_over_pairs() -> None:
    gradients = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    found = conflict_metrics(gradients @ gradients.T)
    root = math.sqrt(0.5)
    assert found == pytest.approx({"conflict_share": 1 / 3, "mean_cosine": (-root + 0.0 + root) / 3})
    assert conflict_metrics(torch.ones(1, 1, dtype=torch.float64)) == {}


def test_cosines_are_between_the_mean_gradients_of_groups() -> None:
    gradients = vectors(4)
    found = step_cosines(gradients @ gradients.T, [4, 5, 6, 7], ["b", "a", "b", "a"])
    a, b = gradients[[1, 3]].mean(0), gradients[[0, 2]].mean(0)
    cosine = float(a @ b / (a.norm() * b.norm()))
    assert (found.of, found.labels) == ("groups", ("a", "b"))
    assert found.values[0] == pytest.approx((1.0, cosine))
    assert found.values[1] == pytest.approx((cosine, 1.0))


@pytest.mark.parametrize("groups", [["a", None], ["a", "a"], [None, None]])
def test_cosines_are_between_tasks_where_groups_tell_none_apart(groups: list[str | None]) -> None:
    gradients = vectors(2)
    found = step_cosines(gradients @ gradients.T, [4, 5], groups)
    assert (found.of, found.labels) == ("tasks", ("4", "5"))
    assert found.values[0][1] == pytest.approx(
        float(torch.cosine_similarity(gradients[0], gradients[1], dim=0))
    )


def test_a_gradient_of_zero_has_cosine_zero() -> None:
    found = step_cosines(torch.tensor([[0.0, 0.0], [0.0, 4.0]], dtype=torch.float64), [0, 1], [None, None])
    assert found.values == ((0.0, 0.0), (0.0, 1.0))


# ---------------------------------------------------------------- gradient surgery


def surgery_on_vectors(gradients: Tensor, orders: Sequence[Sequence[int]]) -> Tensor:
    """Algorithm 1 of Yu et al. 2020, word for word; the mean of what it sums."""
    projected = []
    for place, order in enumerate(orders):
        own = gradients[place].clone()
        for other in order:
            inner = own @ gradients[other]
            if inner < 0:
                own = own - inner / gradients[other].square().sum() * gradients[other]
        projected.append(own)
    return torch.stack(projected).mean(0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 6])
def test_surgery_on_inner_products_equals_the_algorithm_on_vectors(num_tasks: int, seed: int) -> None:
    gradients = vectors(num_tasks, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    orders = []
    for place in range(num_tasks):
        others = [other for other in range(num_tasks) if other != place]
        orders.append([others[i] for i in torch.randperm(num_tasks - 1, generator=generator).tolist()])
    weights = torch.tensor(surgery(gradients @ gradients.T, orders), dtype=torch.float64)
    expected = surgery_on_vectors(gradients, orders)
    torch.testing.assert_close(weights @ gradients, expected, rtol=1e-12, atol=1e-12)


def test_surgery_of_what_does_not_conflict_is_the_mean() -> None:
    gradients = vectors(4).abs()
    assert PCGrad(0).coefficients(records([1.0] * 4), gradients @ gradients.T) == [0.25] * 4


def test_surgery_of_opposite_gradients_and_of_zeros_is_finite() -> None:
    gradients = torch.tensor([[1.0, 0.0], [-3.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    weights = PCGrad(0).coefficients(records([1.0] * 3), gradients @ gradients.T)
    assert (torch.tensor(weights, dtype=torch.float64) @ gradients).tolist() == [0.0, 0.0]


def test_the_order_of_surgery_follows_from_the_seed_and_the_episode_and_no_global_state() -> None:
    gram = vectors(6, 4) @ vectors(6, 4).T

    def coefficients(seed: int, first: int) -> list[float]:
        return PCGrad(seed).coefficients(records([1.0] * 6, first=first), gram)

    torch.manual_seed(1)
    before = torch.get_rng_state()
    once = coefficients(0, 10)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert coefficients(0, 10) == once
    assert coefficients(1, 10) != once
    assert coefficients(0, 16) != once  # the next outer step's tasks


# ---------------------------------------------------------------- the shortest combination


def closed_form(one: Tensor, other: Tensor) -> float:
    """The weight of the first of two (Sener and Koltun 2018, algorithm 1)."""
    if one @ other >= one @ one:
        return 1.0
    if one @ other >= other @ other:
        return 0.0
    return float((other - one) @ other / (one - other).square().sum())


@pytest.mark.parametrize(
    "pair", [((1.0, 2.0), (3.0, -1.0)), ((1.0, 0.0), (5.0, 1.0)), ((4.0, 2.0), (1.0, 0.5))]
)
def test_of_two_gradients_the_shortest_combination_is_the_closed_form(
    pair: tuple[tuple[float, float], tuple[float, float]],
) -> None:
    gradients = torch.tensor(pair, dtype=torch.float64)
    expected = closed_form(*gradients)
    assert shortest(gradients @ gradients.T).tolist() == pytest.approx([expected, 1.0 - expected], abs=1e-15)


@pytest.mark.parametrize("seed", range(6))
def test_of_three_gradients_none_of_a_grid_is_shorter(seed: int) -> None:
    gradients = vectors(3, 3, seed)
    weights = shortest(gradients @ gradients.T)
    found = float((weights @ gradients).square().sum())
    steps = torch.linspace(0.0, 1.0, 201, dtype=torch.float64)
    grid = torch.stack(
        [torch.stack([a, b, 1 - a - b]) for a, b in itertools.product(steps, steps) if a + b <= 1]
    )
    best = float((grid @ gradients).square().sum(1).min())
    assert found <= best * (1 + 1e-12)
    assert found == pytest.approx(best, rel=1e-2)  # the grid is within 1/400 of the minimum, in each weight


@pytest.mark.parametrize(("num_tasks", "size"), [(8, 20), (12, 4), (5, 1), (40, 100)])
def test_the_shortest_combination_meets_the_conditions_of_a_minimum(num_tasks: int, size: int) -> None:
    gradients = vectors(num_tasks, size) + 0.4
    gram = gradients @ gradients.T
    weights = shortest(gram)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-14)
    assert bool((weights >= 0).all())
    slope = gram @ weights
    # Karush, Kuhn and Tucker: equal where there is weight, not smaller elsewhere.
    lowest = float(slope.min())
    assert bool((slope[weights > 0] <= lowest + 2e-12 * float(gram.diagonal().max())).all())


def test_the_shortest_combination_lowers_every_loss_and_tells_its_length() -> None:
    gradients = vectors(3, 6, 3)
    rule = MGDA()
    weights = torch.tensor(
        rule.coefficients(records([1.0] * 3), gradients @ gradients.T), dtype=torch.float64
    )
    combined = weights @ gradients
    assert float((gradients @ combined).min()) == pytest.approx(float(combined.square().sum()), rel=1e-9)
    assert rule.metrics()["shortest_norm"] == pytest.approx(float(combined.norm()))
    assert rule.metrics()["largest_coefficient"] == float(weights.max())


def test_equal_gradients_and_zeros_have_a_shortest_combination() -> None:
    assert float(shortest(torch.ones(3, 3, dtype=torch.float64)).sum()) == pytest.approx(1.0)
    assert float(shortest(torch.zeros(3, 3, dtype=torch.float64)).sum()) == pytest.approx(1.0)


# ---------------------------------------------------------------- tasks by their losses


@pytest.mark.parametrize("q", [0.5, 1.0, 3.0])
def test_fair_weights_are_the_gradient_of_the_fair_objective(q: float) -> None:
    losses = torch.tensor([0.3, 1.7, 0.0, 2.2], dtype=torch.float64, requires_grad=True)
    objective = (losses ** (q + 1) / (q + 1)).mean()
    (expected,) = torch.autograd.grad(objective, losses)
    rule = QFFL(q)
    weights = rule.coefficients(records(losses.tolist()), None)
    assert weights == pytest.approx(expected.tolist(), rel=1e-14)
    assert rule.metrics()["largest_share"] == pytest.approx(2.2**q / sum(x**q for x in (0.3, 1.7, 2.2)))


def test_losses_of_zero_have_fair_weights_of_zero() -> None:
    rule = QFFL(1.0)
    assert rule.coefficients(records([0.0, -1.0]), None) == [0.0, 0.0]
    assert rule.metrics() == {}


def test_even_coefficients_are_those_of_the_mean() -> None:
    assert Even().coefficients(records([3.0, 1.0]), None) == [0.5, 0.5]


# ---------------------------------------------------------------- groups: robust weights


def test_robust_weights_rise_exponentially_with_losses() -> None:
    # Sagawa et al. 2020, algorithm 1, on all groups at once.
    eta, q = 0.3, {"a": 0.5, "b": 0.5}
    rule = GroupDRO(eta)
    for losses in ((1.0, 3.0, 2.0), (0.5, 0.1, 0.1), (4.0, 1.0, 0.0)):
        found = rule.coefficients(records(losses, "abb"), None)
        means = {"a": losses[0], "b": (losses[1] + losses[2]) / 2}
        q = {group: q[group] * math.exp(eta * means[group]) for group in q}
        q = {group: value / sum(q.values()) for group, value in q.items()}
        assert found == pytest.approx([q["a"], q["b"] / 2, q["b"] / 2], rel=1e-13)
        assert sum(found) == pytest.approx(1.0)  # a convex combination
        assert rule.metrics() == pytest.approx({"weight/a": q["a"], "weight/b": q["b"]}, rel=1e-13)


def test_robust_weights_keep_the_scale_where_groups_are_missing_and_let_new_ones_in() -> None:
    rule = GroupDRO(1e-9)  # weights stay equal
    assert rule.coefficients(records([1.0, 1.0], "ab"), None) == pytest.approx([0.5, 0.5])
    assert rule.coefficients(records([1.0], "c"), None) == pytest.approx([1.0])
    assert rule.metrics() == pytest.approx({f"weight/{group}": 1 / 3 for group in "abc"})
    assert rule.coefficients(records([1.0, 1.0, 1.0], "bba"), None) == pytest.approx([0.25, 0.25, 0.5])


def test_robust_weights_do_not_overflow() -> None:
    rule = GroupDRO(1.0)
    for _ in range(3):
        found = rule.coefficients(records([900.0, 1.0], "ab"), None)
    assert found == [1.0, 0.0]


# ---------------------------------------------------------------- groups: even training rates


def gradnorm_by_autograd(
    weights: dict[str, float],
    first: dict[str, float],
    losses: dict[str, float],
    gradients: dict[str, Tensor],
    *,
    alpha: float,
    lr: float,
) -> dict[str, float]:
    """Algorithm 1 of Chen et al. 2018 in log w, with equation 2, over the mean norm, differentiated by
    torch."""
    v = {
        group: torch.tensor(math.log(weights[group]), dtype=torch.float64, requires_grad=True)
        for group in weights
    }
    norms = {group: (v[group].exp() * gradients[group]).norm() for group in losses}
    mean_norm = torch.stack(list(norms.values())).mean().detach()
    ratios = {group: losses[group] / first[group] for group in losses}
    mean_ratio = sum(ratios.values()) / len(ratios)
    objective = torch.stack(
        [(norms[group] - mean_norm * (ratios[group] / mean_ratio) ** alpha).abs() for group in losses]
    ).sum()
    (objective / mean_norm).backward()  # type: ignore[no-untyped-call]
    moved = {
        group: math.exp(float(value.detach()) - lr * (0.0 if value.grad is None else float(value.grad)))
        for group, value in v.items()
    }
    return {group: len(moved) * value / sum(moved.values()) for group, value in moved.items()}


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_weights_that_even_out_training_rates_follow_the_gradient_of_equation_2(alpha: float) -> None:
    rule, weights, first = GradNorm(alpha, 0.05), dict.fromkeys("abc", 1.0), {"a": 1.0, "b": 2.5, "c": 0.7}
    # The third step lacks a group, whose weight moves by the division alone.
    steps: list[tuple[str, list[float]]] = [
        ("abbc", [1.0, 3.0, 2.0, 0.7]),
        ("abbc", [0.4, 2.2, 2.6, 0.5]),
        ("ab", [0.3, 2.0]),
    ]
    for number, (groups, losses) in enumerate(steps):
        gradients = vectors(len(groups), seed=number)
        weighted = torch.stack([rule.weight(g) * row for g, row in zip(groups, gradients, strict=True)])
        found = rule.coefficients(records(losses, groups), weighted @ weighted.T)
        assert found == [1 / len(groups)] * len(groups)
        assert rule.metrics() == pytest.approx({f"weight/{g}": w for g, w in weights.items()})
        rows = {group: [place for place, name in enumerate(groups) if name == group] for group in set(groups)}
        weights = gradnorm_by_autograd(
            weights,
            first,
            {group: sum(losses[row] for row in places) / len(places) for group, places in rows.items()},
            {group: gradients[places].mean(0) for group, places in rows.items()},
            alpha=alpha,
            lr=0.05,
        )
        assert {group: rule.weight(group) for group in "abc"} == pytest.approx(weights, rel=1e-12)
        assert sum(weights.values()) == pytest.approx(3.0)


def test_a_weight_stays_above_zero() -> None:
    rule = GradNorm(0.0, 1000.0)
    gradients = torch.tensor([[5.0, 0.0], [0.1, 0.0]], dtype=torch.float64)
    rule.coefficients(records([1.0, 1.0], "ab"), gradients @ gradients.T)
    assert 0.0 < rule.weight("a") < 1e-5
    assert rule.weight("a") + rule.weight("b") == pytest.approx(2.0)


def test_gradients_that_are_zero_leave_the_weights_alone() -> None:
    rule = GradNorm(1.5, 0.5)
    rule.coefficients(records([1.0, 2.0], "ab"), torch.zeros(2, 2, dtype=torch.float64))
    assert (rule.weight("a"), rule.weight("b")) == (1.0, 1.0)


def test_weights_bring_norms_together_whatever_the_size_of_the_losses() -> None:
    """Gradients of sizes 1 and 10,000, as of regressions whose targets are 1 and 100 large."""
    rule = GradNorm(0.0, 0.05)
    gradients = torch.tensor([[1.0, 0.0], [0.0, 1e4]], dtype=torch.float64)
    for _ in range(400):
        weighted = torch.stack([rule.weight(g) * row for g, row in zip("ab", gradients, strict=True)])
        rule.coefficients(records([1.0, 1e4], "ab"), weighted @ weighted.T)
    # At rest weights swing by 0.05 either way in their logarithms.
    assert rule.weight("a") / rule.weight("b") == pytest.approx(1e4, rel=0.12)


def test_a_large_rate_is_no_overflow() -> None:
    rule = GradNorm(0.0, 1000.0)
    gradients = torch.tensor([[5.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    rule.coefficients(records([1.0, 1.0], "ab"), gradients @ gradients.T)
    assert rule.weight("a") + rule.weight("b") == pytest.approx(2.0)


def test_a_step_with_one_group_leaves_the_weights_alone() -> None:
    rule = GradNorm(1.5, 0.5)
    gradients = vectors(2)
    rule.coefficients(records([1.0, 2.0], "aa"), gradients @ gradients.T)
    assert rule.weight("a") == 1.0


# ---------------------------------------------------------------- groups: uncertainty


def test_log_variances_follow_the_gradient_of_their_own_mean_objective() -> None:
    rule, lr = Uncertainty(0.2), 0.2
    s = {"a": 0.0, "b": 0.0}
    for losses in ((1.0, 3.0, 2.0), (0.5, 0.1, 0.1), (4.0, 1.0, 0.0)):
        for group, loss in (("a", losses[0]), ("b", (losses[1] + losses[2]) / 2)):
            assert rule.weight(group) == pytest.approx(0.5 * math.exp(-s[group]), rel=1e-14)
            variable = torch.tensor(s[group], dtype=torch.float64, requires_grad=True)
            sigma = (0.5 * variable).exp()
            (loss / (2.0 * sigma**2) + sigma.log()).backward()  # type: ignore[no-untyped-call]
            assert variable.grad is not None
            s[group] -= lr * float(variable.grad)
        rule.update(records(losses, "abb"))
        assert rule.scalars()["log_variances"] == pytest.approx(s, rel=1e-13)
    assert rule.shown() == {group: rule.weight(group) for group in "ab"}


def test_a_variance_comes_to_rest_at_the_loss() -> None:
    rule = Uncertainty(0.5)
    for _ in range(200):
        rule.update(records([0.3], "a"))
    assert rule.weight("a") == pytest.approx(0.5 / 0.3, rel=1e-9)


def test_a_variance_never_becomes_infinite() -> None:
    rule = Uncertainty(1.0)
    rule.update(records([1e300, -1e300], "ab"))
    rule.update(records([1e300, -1e300], "ab"))
    assert all(0.0 < weight < math.inf for weight in rule.shown().values())


# ---------------------------------------------------------------- groups: rates of the losses


def test_dynamic_weights_are_those_of_equation_7() -> None:
    temperature, stretch = 0.7, 2
    rule = DWA(temperature, stretch)
    course = [("ab", (4.0, 1.0)), ("ab", (2.0, 3.0)), ("ab", (1.5, 2.0)), ("aab", (1.0, 1.2, 2.2))]
    for groups, losses in course[:3]:
        rule.update(records(losses, groups))
        assert (rule.weight("a"), rule.weight("b"), rule.weight("new")) == (1.0, 1.0, 1.0)
    rule.update(records(course[3][1], course[3][0]))
    # Each step counts once in its stretch: (4 + 2) / 2, (1.5 + 1.1) / 2; (1 + 3) / 2, (2 + 2.2) / 2.
    ratios = {"a": 1.3 / 3.0, "b": 2.1 / 2.0}
    exponentials = {group: math.exp(ratio / temperature) for group, ratio in ratios.items()}
    for group in "ab":
        expected = 2.0 * exponentials[group] / sum(exponentials.values())
        assert rule.weight(group) == pytest.approx(expected, rel=1e-14)
    # A stretch without b leaves its ratio, and the last two of a decide anew.
    rule.update(records([1.0], "a"))
    rule.update(records([1.0], "a"))
    ratios["a"] = 1.0 / 1.3
    exponentials = {group: math.exp(ratio / temperature) for group, ratio in ratios.items()}
    assert rule.weight("b") == pytest.approx(2.0 * exponentials["b"] / sum(exponentials.values()), rel=1e-14)


def test_a_dynamic_weight_is_never_zero() -> None:
    rule = DWA(0.01, 1)
    for losses in ((1.0, 1.0), (1.0, 1e9)):
        rule.update(records(losses, "ab"))
    assert 0.0 < rule.weight("a") < 1e-11
    assert rule.weight("b") == pytest.approx(2.0)


# ---------------------------------------------------------------- groups: frequency


def test_rare_groups_weigh_more_so_that_all_count_alike() -> None:
    rule = Upweighting()
    assert rule.weight("a") == 1.0
    rule.update(records([1.0] * 6, "aaaabb"))
    rule.update(records([1.0] * 3, "aab"))
    assert (rule.weight("a"), rule.weight("b")) == (9 / 12, 9 / 6)
    assert 6 * rule.weight("a") == 3 * rule.weight("b")
    assert rule.weight("new") == 1.0


# ---------------------------------------------------------------- what all have


WEIGHTS: dict[str, Callable[[], GroupWeights]] = {
    "uncertainty": lambda: Uncertainty(0.1),
    "dwa": lambda: DWA(1.0, 2),
    "upweighting": Upweighting,
}
RULES: dict[str, Callable[[], TaskRule]] = {
    "group_dro": lambda: GroupDRO(0.2),
    "gradnorm": lambda: GradNorm(1.5, 0.1),
}
COURSE = [("ab", [1.0, 2.0]), ("ca", [0.3, 0.9]), ("bc", [1.5, 0.2]), ("ab", [0.8, 1.4]), ("cb", [0.1, 1.3])]


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("stop", [1, 3])
def test_weights_of_groups_go_on_from_a_checkpoint_as_if_nothing_had_happened(name: str, stop: int) -> None:
    whole, part = WEIGHTS[name](), WEIGHTS[name]()
    for number, (groups, losses) in enumerate(COURSE):
        if number == stop:
            state, part = reloaded(part.scalars()), WEIGHTS[name]()
            part.load(state)
        for weights in (whole, part):
            weights.update(records(losses, groups))
        assert part.shown() == whole.shown()
        assert [part.weight(group) for group in "abcd"] == [whole.weight(group) for group in "abcd"]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("stop", [1, 3])
def test_rules_of_groups_go_on_from_a_checkpoint_as_if_nothing_had_happened(name: str, stop: int) -> None:
    whole, part = RULES[name](), RULES[name]()
    for number, (groups, losses) in enumerate(COURSE):
        if number == stop:
            state, part = reloaded(part.scalars()), RULES[name]()
            part.load(state)
        gradients = vectors(2, seed=number)
        found = [
            rule.coefficients(records(losses, groups), gradients @ gradients.T) for rule in (whole, part)
        ]
        assert found[0] == found[1]
        assert part.metrics() == whole.metrics()
        assert [part.weight(group) for group in "abcd"] == [whole.weight(group) for group in "abcd"]


def test_weights_of_few_groups_are_shown_each_and_of_many_as_a_range() -> None:
    assert weight_metrics({"b/ü 1": 2.0, "a": 1.0}) == {"weight/a": 1.0, "weight/b___1": 2.0}
    many = {f"user {row}": float(row) for row in range(17)}
    assert weight_metrics(many) == {"weight_smallest": 0.0, "weight_largest": 16.0}
    assert weight_metrics({}) == {}


LIKE = {"init.a": torch.zeros(2, dtype=torch.float64)}


def step(combiner: Combiner, losses: Sequence[float], groups: str) -> Combined:
    """An outer step whose task t has the gradient [L_t, 1], or times its weight."""
    batch = TaskBatch(tuple(range(len(losses))), {}, {}, groups=tuple(groups))
    for part in combiner.parts(batch):
        weights = torch.ones(part.num_tasks, dtype=torch.float64) if part.weights is None else part.weights
        own = torch.tensor([losses[number] for number in part.numbers], dtype=torch.float64)
        gradient = torch.stack([own, torch.ones_like(own)], 1) * weights[:, None]
        combiner.add(MetaGradient({"init.a": gradient.sum(0)}, weights * own, {}), part)
    return combiner.combine(len(losses))


@pytest.mark.parametrize("name", [*WEIGHTS, *RULES])
def test_a_step_that_is_not_finite_is_passed_on_and_leaves_the_weights_as_they_are(name: str) -> None:
    combiner: Combiner = (
        Weighted(WEIGHTS[name](), LIKE, Replicated(), metric_names=())
        if name in WEIGHTS
        else PerTask(RULES[name](), LIKE, Replicated(), metric_names=())
    )
    step(combiner, [1.0, 3.0], "ab")
    before = reloaded(combiner.scalars())
    for bad in (math.nan, math.inf):
        combined = step(combiner, [1.0, bad], "ab")
        assert not combined.gradient["init.a"].isfinite().all()  # so the outer step is skipped
        assert combiner.scalars() == before
    assert step(combiner, [1.0, 2.0], "ab").gradient["init.a"].isfinite().all()
    assert combiner.scalars() != before


def test_inner_products_that_overflow_leave_the_weights_as_they_are() -> None:
    combiner = PerTask(GradNorm(1.5, 0.1), LIKE, Replicated(), metric_names=())
    combined = step(combiner, [1.0, 1e200], "ab")
    assert combined.metrics.keys() == {"meta_loss", "left_out"}
    assert combiner.scalars() == {"weights": {}, "first_losses": {}}
    assert combiner.cosines is None
