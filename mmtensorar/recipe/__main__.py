"""Check a recipe and print it resolved, or print its plan: parameters, memory and
FLOPs.

    mmtensorar recipe RECIPE.yaml [key=value ...]    check it and print it resolved
    mmtensorar plan RECIPE.yaml [key=value ...]      parameters, memory and FLOPs
    mmtensorar recipe --docs                         docs/recipe.md

`mmtensorar recipe RECIPE.yaml --plan` does the same as `mmtensorar plan`. The recipe of
study.train_image_tokenizer can be checked and printed too.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path

from mmtensorar.cli import Parser, command
from mmtensorar.recipe import Recipe, RecipeError, Section, given_twice, read_recipe, read_settings

# Other commands of the checkout that have recipes: module -> class of the recipe.
OTHER_RECIPES = {"study.train_image_tokenizer": "ImageTokenizerRecipe"}


def read_any_recipe(path: Path, overrides: list[str]) -> Section:
    """A recipe of training or of another command, recognised by its keys.

    Prints a note for a setting that is given twice. Raises RecipeError.
    """
    print_notes(given_twice(overrides))
    keys = read_settings(path).keys()
    if not keys & Recipe.model_fields.keys():
        for module, name in OTHER_RECIPES.items():
            model = getattr(importlib.import_module(module), name)
            if keys & model.model_fields.keys():
                return read_recipe(model, path, overrides)
    return Recipe.load(path, overrides)


def parser_for(prog: str, description: str, example: str) -> Parser:
    """A parser of RECIPE key=value ..., whose help ends with an example."""
    parser = Parser(
        prog=prog,
        description=description,
        example=example,
    )
    parser.add_argument("recipe", nargs="?", type=Path, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.steps=100")
    return parser


def print_plan(path: Path, overrides: list[str]) -> None:
    """Print parameters, memory and FLOPs of a training recipe; loads no weights."""
    recipe = read_any_recipe(path, overrides)
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"{path}: a recipe of {type(recipe).__module__}; only training has a plan")
    from mmtensorar.training import plan, recipe_check

    print_notes(recipe_check.check_files(recipe))
    print(plan.report(recipe))


def print_notes(notes: Iterable[str]) -> None:
    """Print notes on stderr: the recipe itself goes to stdout, to a file or a pipe."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr, flush=True)


def print_checked(path: Path, overrides: list[str]) -> None:
    """Print a recipe resolved, and on stderr what is not on this machine.

    Raises ValueError when training would refuse it.
    """
    recipe = read_any_recipe(path, overrides)
    if isinstance(recipe, Recipe):
        # Imported here, after the recipe was read, since torch takes seconds.
        from mmtensorar.training import recipe_check

        print_notes(recipe_check.check_files(recipe))
        print_notes(recipe_check.check_sizes(recipe))
    print(recipe.dump(), end="")


@command
def main(arguments: list[str] | None = None) -> int:
    parser = parser_for(
        "python -m mmtensorar.recipe",
        "Check a recipe and print it resolved.",
        "recipes/janus_pro_7b.yaml train.steps=100",
    )
    parser.add_argument(
        "--plan", action="store_true", help="print parameters, memory and FLOPs instead; loads no weights"
    )
    parser.add_argument("--docs", action="store_true", help="print docs/recipe.md, made from the schema")
    options = parser.parse_intermixed_args(arguments)
    if options.docs:
        from mmtensorar.recipe import docs

        print(docs.page(), end="")
    elif options.recipe is None:
        parser.error("recipe is missing")
    elif options.plan:
        print_plan(options.recipe, options.overrides)
    else:
        print_checked(options.recipe, options.overrides)
    return 0


@command
def plan(arguments: list[str] | None = None) -> int:
    """`mmtensorar plan RECIPE [key=value ...]`."""
    parser = parser_for(
        "mmtensorar plan",
        "Print parameters, memory and FLOPs of a recipe; loads no weights.",
        "recipes/janus_pro_1b.yaml zero.stage=3",
    )
    options = parser.parse_intermixed_args(arguments)
    if options.recipe is None:
        parser.error("recipe is missing")
    print_plan(options.recipe, options.overrides)
    return 0


if __name__ == "__main__":
    sys.exit(main())
