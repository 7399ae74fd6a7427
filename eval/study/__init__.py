"""Does refinement beat a plain fine-tune, and with which settings? Grids of small runs, scored alike.

    python -m eval.study run eval/study/grids/shapes.yaml --budget 2h      trains and scores what is missing
    python -m eval.study report docs/study/shapes                       writes the page from the stored results alone

A grid (eval/study/grids/) names a world, which is a file of this folder: where its data come from and what is right in a picture.
"""
