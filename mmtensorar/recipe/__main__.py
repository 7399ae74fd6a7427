"""Check a recipe and print it resolved, or what it takes.

python -m mmtensorar.recipe RECIPE.yaml [key=value ...]           check it and print it resolved
python -m mmtensorar.recipe RECIPE.yaml [key=value ...] --plan    sizes, memory and FLOPs; loads no weights
"""

import argparse
import sys

from mmtensorar.recipe import Recipe, RecipeError, read_recipe, read_settings, recipe_class


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check a recipe and print it resolved.")
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.steps=100")
    parser.add_argument(
        "--plan", action="store_true", help="print parameters, memory and FLOPs; loads no weights"
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        recipe = read_recipe(recipe_class(read_settings(options.recipe)), options.recipe, options.overrides)
        if options.plan and not isinstance(recipe, Recipe):
            raise RecipeError(
                f"{options.recipe}: a recipe of {type(recipe).__module__}, for which there is no plan"
            )
        if options.plan:
            from mmtensorar.training import plan

            print(plan.report(recipe))
        else:
            print(recipe.dump(), end="")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
