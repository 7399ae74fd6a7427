"""report.html next to summary.json: a bar per skill, then pictures that passed and
failed, with detections.

One file without scripts or links, which any browser shows offline. Everything that
comes from prompts and results is escaped.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from eval import layout

SIDE = 220  # of a picture on the page, in pixels
PER_SKILL = 4  # pictures that passed, and as many that failed
MAX_BOXES = 12  # drawn on a picture, best score first

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  color: #1d2430 }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2.2rem }
table { border-collapse: collapse; width: 100% } td { padding: .2rem .6rem .2rem 0; white-space: nowrap }
td.bar { width: 60% } .track { background: #e8ebf0; height: 1.1rem; position: relative }
.share { background: #3867b8; height: 100% }
.interval { position: absolute; top: .45rem; height: .2rem; background: #1d2430 }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0; width: 220px }
img { width: 220px; border-top: 4px solid }
.pass img { border-color: #2f9e55 } .fail img { border-color: #cf3a3a }
figcaption { font-size: .85rem } .reason { color: #a02c2c; white-space: pre-line }
.note { color: #5b6577; font-size: .9rem }
"""


def page(summary: dict, results: Sequence[dict], folder: Path) -> str:
    """The page as text.

    results: rows of results.jsonl; folder: where their files are.
    """
    mark = " (PARTIAL)" if summary.get("partial") else ""
    title = f"{summary['suite']}: {100 * summary['overall']['accuracy']:.1f} %{mark}"
    facts = {
        "checkpoint": summary.get("checkpoint"),
        "images": f"{summary['num_images']} of {summary['num_prompts']} prompts, in {summary['images']}",
        "prompts with a correct image": f"{100 * summary['prompt_accuracy']:.1f} %",
        "partial": layout.in_words(summary.get("partial_numbers") or {}) or None,
        "detector": summary["detector"],
        "seed": summary.get("seed"),
    }
    lines = "<br>".join(
        f"{name}: {html.escape(str(value))}" for name, value in facts.items() if value is not None
    )
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(title)}</h1><p class=note>{lines}</p>",
        "<table>",
        *(_bar(name, skill) for name, skill in [*summary["skills"].items(), ("overall", summary["overall"])]),
        "</table><p class=note>Percent correct; the dark line is the 95 % interval. "
        "Overall is the mean of the skills.</p>",
    ]
    for skill in summary["skills"]:
        parts.append(f"<h2>{html.escape(skill)}</h2><div class=pictures>")
        rows = [row for row in results if row["tag"] == skill]
        for correct in (True, False):
            parts += [
                _figure(row, folder) for row in _spread([row for row in rows if row["correct"] == correct])
            ]
        parts.append("</div>")
    return "\n".join(parts) + "\n</html>\n"


def _spread(rows: Sequence[dict]) -> Iterator[dict]:
    """A few rows, evenly spaced, so that they show several prompts."""
    num = min(PER_SKILL, len(rows))
    return (rows[index * len(rows) // num] for index in range(num))


def _bar(name: str, score: dict) -> str:
    share, (low, high) = 100 * score["accuracy"], (100 * limit for limit in score["interval"])
    track = f"<div class=share style='width:{share:.2f}%'></div>"
    track += f"<div class=interval style='left:{low:.2f}%;width:{high - low:.2f}%'></div>"
    numbers = f"{share:.1f} [{low:.0f}-{high:.0f}]"
    return f"<tr><td>{html.escape(name)}<td class=bar><div class=track>{track}</div><td>{numbers}</tr>"


def _figure(row: dict, folder: Path) -> str:
    buffer = io.BytesIO()
    drawn(layout.open_image(folder / row["filename"]), row["detections"]).save(buffer, "PNG")
    source = base64.b64encode(buffer.getvalue()).decode()
    reason = f"<div class=reason>{html.escape(row['reason'])}</div>" if row["reason"] else ""
    name = f"<div class=note>{html.escape(row['filename'])}</div>"
    caption = f"<figcaption>{html.escape(row['prompt'])}{reason}{name}</figcaption>"
    verdict = "pass" if row["correct"] else "fail"
    return f"<figure class={verdict}><img alt='' src='data:image/png;base64,{source}'>{caption}</figure>"


def drawn(image: Image.Image, detections: Sequence[dict]) -> Image.Image:
    """An image of SIDE pixels with the boxes, names, colours and scores of its best
    detections.
    """
    scale = SIDE / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    # Enlarged pixels should look like pixels.
    image = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    for detection in sorted(detections, key=lambda detection: -detection["score"])[:MAX_BOXES]:
        if detection["score"] <= 0.3:  # GenEval ignores these
            continue
        left, top, right, bottom = (side * scale for side in detection["box"])
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline="#00d0ff", width=2)
        words = " ".join(filter(None, [detection["color"], detection["label"], f"{detection['score']:.2f}"]))
        corner = (left + 3, max(0, top - 14) if top > 14 else top + 2)
        pen.rectangle(pen.textbbox(corner, words, font), fill="#003a4d")
        pen.text(corner, words, "white", font)
    return image
