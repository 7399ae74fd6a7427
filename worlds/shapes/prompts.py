"""The fixed prompts that the shapes world is evaluated on, and correct pictures of
them.

Draw n of skill s comes from default_rng([20_000, s, n]). A caption that the skill
already has is skipped, so the first prompts are the same for any number of prompts.
Training pictures come from default_rng([seed, index]): data made with any --seed except
20000 and 30000 shares no draw with these prompts, or with the pictures of
`correct_picture`. The grammar is small, though: it has 32 captions of a single object,
and training sees them all. The prompts measure pictures for known words, not new words.
"""

from itertools import count

import numpy as np
from PIL import Image

from worlds.shapes.draw import SKILLS, draw, sample_scene

PROMPT_SEED = 20_000
PICTURE_SEED = 30_000
NUM_PROMPTS = 20  # of each skill, unless asked otherwise


def skill_prompts(skill: str, num_prompts: int = NUM_PROMPTS) -> list[dict]:
    """Prompts of one skill, as GenEval specifications (see Scene.metadata).

    Raises ValueError when the grammar has fewer captions.
    """
    prompts: dict[str, dict] = {}
    num_repeats = 0
    for draw_number in count():
        scene = sample_scene(np.random.default_rng([PROMPT_SEED, SKILLS.index(skill), draw_number]), skill)
        num_repeats = num_repeats + 1 if scene.caption in prompts else 0
        prompts.setdefault(scene.caption, scene.metadata)
        if len(prompts) == num_prompts:
            break
        if num_repeats == 1000:
            raise ValueError(
                f"{num_prompts} prompts per skill asked for, but the shapes grammar has about {len(prompts)} "
                f"captions for {skill}; ask for fewer prompts, or for more images of each"
            )
    return list(prompts.values())


def correct_picture(number: int, size: int) -> tuple[dict, Image.Image]:
    """A GenEval specification and a correct picture of it.

    Consecutive numbers go through the skills. size: pixels a side.
    """
    rng = np.random.default_rng([PICTURE_SEED, number])
    scene = sample_scene(rng, SKILLS[number % len(SKILLS)])
    return scene.metadata, draw(scene, rng, size)
