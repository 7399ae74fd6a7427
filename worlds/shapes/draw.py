"""The embedded world `shapes`: coloured shapes on plain grounds, drawn from a caption
grammar.

The grammar has GenEval's six skills. The world is a test bench: small enough to train
on with two CPU cores, exact enough to be scored without a learned detector
(`detect.py`). Scores on it are never GenEval scores.

Every caption is `TEMPLATE % phrase`; for each skill the phrase is

    single_object   a circle                       two_object   a circle and a star
    counting        three hearts (two to four)     colors       a red circle
    position        a circle left of a star        color_attr   a red circle and a blue star

What a caption leaves open (colour, size, position, ground) is drawn at random. In a
quarter of the position captions both shapes also have a colour ("a red circle left of a
blue star").
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

SKILLS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# How often each is drawn for training: twice as often if several shapes must be right
# at once.
SKILL_SHARES = (0.1, 0.2, 0.2, 0.1, 0.2, 0.2)
RELATIONS = ("left of", "right of", "above", "below")
TEMPLATES = ("a photo of %s", "%s", "a picture of %s", "an image of %s")
NUMBERS = {2: "two", 3: "three", 4: "four"}

# GenEval's ten colours, in its order. The values are ours: far apart from each other
# and from every ground.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "orange": (255, 140, 0),
    "yellow": (250, 228, 40),
    "green": (30, 150, 50),
    "blue": (40, 70, 225),
    "purple": (135, 35, 175),
    "pink": (255, 150, 195),
    "brown": (115, 65, 25),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
}

# Muted and of middle brightness, so that black and white shapes are as visible as the
# others.
GROUNDS: tuple[tuple[int, int, int], ...] = (
    (140, 140, 140),
    (125, 140, 155),
    (165, 155, 140),
    (135, 155, 140),
)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five-pointed star: inside unless the point lies behind the edge between its
    nearest tip and notch.
    """
    angle = np.arctan2(u, -v) % (2 * np.pi / 5)
    angle = np.abs(angle - np.pi / 5)  # 0 at a notch, pi/5 at a tip
    radius = np.hypot(u, v)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    notch, tip = 0.45, (np.cos(np.pi / 5), np.sin(np.pi / 5))
    return (x - notch) * tip[1] - y * (tip[0] - notch) <= 0


# Shape -> predicate on (u, v) in [-1, 1], v pointing down.
_INSIDE = {
    "circle": lambda u, v: u**2 + v**2 <= 1,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) <= 0.88,
    "triangle": lambda u, v: (v <= 0.85) & (np.abs(u) <= (v + 0.95) / 1.8),
    "star": _star,
    "bar": lambda u, v: (np.abs(u) <= 1) & (np.abs(v) <= 0.42),
    "ring": lambda u, v: (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.30),
    "diamond": lambda u, v: np.abs(u) / 0.62 + np.abs(v) <= 1,
    "heart": lambda u, v: (
        ((1.2 * u) ** 2 + (-1.2 * v + 0.12) ** 2 - 1) ** 3 - (1.2 * u) ** 2 * (-1.2 * v + 0.12) ** 3 <= 0
    ),
}
SHAPES: tuple[str, ...] = tuple(_INSIDE)
PLURALS = {name: name + ("es" if name.endswith("s") else "s") for name in SHAPES}


@dataclass(frozen=True)
class Object:
    """One shape to draw. color is None when the caption leaves it open."""

    shape: str
    color: str | None = None


@dataclass(frozen=True)
class Scene:
    """The meaning of a caption.

    relation: where objects[0] is relative to objects[1].
    """

    skill: str
    caption: str
    objects: tuple[Object, ...]
    relation: str | None = None

    @property
    def metadata(self) -> dict:
        """The scene as one GenEval prompt specification (one line of its
        evaluation_metadata.jsonl).
        """
        include: list[dict] = []
        if self.skill == "counting":
            shape, count = self.objects[0].shape, len(self.objects)
            return {
                "tag": self.skill,
                "include": [{"class": shape, "count": count}],
                "exclude": [{"class": shape, "count": count + 1}],
                "prompt": self.caption,
            }
        # GenEval lists the reference object first: a position refers to clause 0.
        objects = self.objects[::-1] if self.relation else self.objects
        for item in objects:
            clause: dict = {"class": item.shape, "count": 1}
            if item.color:
                clause["color"] = item.color
            include.append(clause)
        if self.relation:
            include[1]["position"] = [self.relation, 0]
        return {"tag": self.skill, "include": include, "prompt": self.caption}


def _phrase(item: Object) -> str:
    words = f"{item.color} {item.shape}" if item.color else item.shape
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def sample_scene(rng: np.random.Generator, skill: str | None = None) -> Scene:
    """A random scene. skill: one of SKILLS, or None for a random one with SKILL_SHARES.

    Raises ValueError for an unknown skill.
    """
    if skill is None:
        skill = SKILLS[rng.choice(len(SKILLS), p=SKILL_SHARES)]
    if skill not in SKILLS:
        raise ValueError(f"unknown skill {skill!r}; known: {', '.join(SKILLS)}")
    first, second = (SHAPES[i] for i in rng.choice(len(SHAPES), 2, replace=False))
    names = list(COLORS)
    color_a, color_b = (names[i] for i in rng.choice(len(names), 2, replace=False))
    relation = None
    if skill == "single_object":
        objects = (Object(first),)
    elif skill == "colors":
        objects = (Object(first, color_a),)
    elif skill == "counting":
        objects = (Object(first),) * int(rng.integers(2, 5))
    elif skill == "color_attr":
        objects = (Object(first, color_a), Object(second, color_b))
    elif skill == "position":
        relation = RELATIONS[rng.integers(len(RELATIONS))]
        colored = rng.random() < 0.25
        objects = (Object(first, color_a if colored else None), Object(second, color_b if colored else None))
    else:
        objects = (Object(first), Object(second))
    if skill == "counting":
        phrase = f"{NUMBERS[len(objects)]} {PLURALS[first]}"
    elif relation:
        phrase = f"{_phrase(objects[0])} {relation} {_phrase(objects[1])}"
    else:
        phrase = " and ".join(map(_phrase, objects))
    return Scene(skill, TEMPLATES[rng.integers(len(TEMPLATES))] % phrase, objects, relation)


@lru_cache(maxsize=1024)
def coverage(shape: str, radius: float, x: float, y: float, size: int) -> np.ndarray:
    """Share of each pixel that a shape covers, from 6x6 samples a pixel.

    The result is cached: the world has few outlines at many positions.

    Args:
        shape: One of SHAPES.
        radius: In pixels.
        x, y: Centre in pixels.
        size: Pixels a side of the result.

    Returns [size, size] float32 in [0, 1], read-only.
    """
    samples = 6
    grid = (np.arange(size * samples) + 0.5) / samples
    u, v = (grid - x) / radius, (grid - y) / radius
    inside = _INSIDE[shape](u[None, :], v[:, None])
    covered = inside.reshape(size, samples, size, samples).mean((1, 3)).astype(np.float32)
    covered.flags.writeable = False
    return covered


def _place(
    rng: np.random.Generator, count: int, relation: str | None, size: int
) -> list[tuple[float, float, float]]:
    """Centres and radii (x, y, radius) of shapes that touch neither each other nor the
    border.

    They are drawn by rejection. Centres are on a lattice of 8 pixels, the pixels of one
    image code, and there are only a few radii in whole pixels (at size 64), so that a
    small model sees each outline often, at the same offset from the lattice.
    """
    unit = size / 64
    radii = {1: (11, 13, 16, 18), 2: (9, 11, 13), 3: (9, 11), 4: (9,)}[count]
    gap, margin, lattice = 3 * unit, 3 * unit, 8 * unit
    while True:
        placed: list[tuple[float, float, float]] = []
        for _ in range(60):
            radius = radii[rng.integers(len(radii))] * unit
            first, last = -(-(margin + radius) // lattice), (size - margin - radius) // lattice
            x, y = rng.integers(int(first), int(last) + 1, 2) * lattice
            # Separated along x or along y, so that their boxes do not touch either.
            if all(max(abs(x - a), abs(y - b)) >= radius + r + gap for a, b, r in placed):
                placed.append((x, y, radius))
            if len(placed) == count:
                break
        if len(placed) < count:
            continue
        if relation:
            (x, y, _), (a, b, _) = placed
            dx, dy = x - a, y - b
            along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
            wanted = -1 if relation in ("left of", "above") else 1
            # Clearly in that direction: by GenEval's rule a diagonal would satisfy two
            # relations.
            if along * wanted <= 0 or abs(across) > 0.45 * abs(along):
                continue
        return placed


def draw(scene: Scene, rng: np.random.Generator, size: int = 64) -> Image.Image:
    """An RGB picture of a scene: anti-aliased, upright shapes that do not touch.

    size: pixels a side.
    """
    pixels = np.full((size, size, 3), GROUNDS[rng.integers(len(GROUNDS))], np.float32)
    free = [name for name in COLORS if name not in {o.color for o in scene.objects}]
    shared = free[rng.integers(len(free))]
    for item, (x, y, radius) in zip(
        scene.objects, _place(rng, len(scene.objects), scene.relation, size), strict=True
    ):
        # Counted shapes share a colour; otherwise each open colour is drawn
        # independently.
        name = item.color or (shared if scene.skill == "counting" else free[rng.integers(len(free))])
        # Only the box around the shape changes; (left, top) is its corner.
        half = int(radius) + 2
        left, top = max(int(x) - half, 0), max(int(y) - half, 0)
        alpha = coverage(item.shape, radius, x - left, y - top, 2 * half + 1)[..., None]
        box = pixels[top : top + 2 * half + 1, left : left + 2 * half + 1]
        box += alpha[: box.shape[0], : box.shape[1]] * (np.array(COLORS[name], np.float32) - box)
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8), "RGB")
