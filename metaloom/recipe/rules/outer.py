"""Rules about the outer loop."""

from metaloom.recipe.rules.base import Broken, Rule
from metaloom.recipe.schema import Recipe


def rates_are_learned(recipe: Recipe) -> Broken:
    if recipe.outer.lr_rates is not None and recipe.adaptation.rule.learned == "none":
        yield (
            "outer.lr_rates",
            f"{recipe.outer.lr_rates}; has no effect, since adaptation.rule.learned is none; leave it out",
        )


def loss_parameters_are_learned(recipe: Recipe) -> Broken:
    if recipe.outer.lr_loss is not None and not recipe.adaptation.learns_loss:
        yield (
            "outer.lr_loss",
            f"{recipe.outer.lr_loss}; has no effect, since adaptation.loss.learned is empty; leave it out",
        )


_WITH_FIELDS = {"rates": "lr_rates", "loss": "lr_loss", "posterior": "lr_posterior"}


def parts_are_weights(recipe: Recipe) -> Broken:
    for entry, rate in recipe.outer.lr_parts.items():
        field = _WITH_FIELDS.get(entry.partition(".")[0])
        if field is not None:
            yield f"outer.lr_parts.{entry}", f"{rate}; is given as outer.{field}; move it there"


def warmup_ends(recipe: Recipe) -> Broken:
    warmup_steps, num_steps = recipe.outer.schedule.warmup_steps, recipe.outer.num_steps
    if warmup_steps >= num_steps:
        yield (
            "outer.schedule.warmup_steps",
            f"{warmup_steps}; must be less than outer.num_steps = {num_steps}",
        )


RULES: tuple[Rule, ...] = (
    rates_are_learned,
    loss_parameters_are_learned,
    parts_are_weights,
    warmup_ends,
)
