"""Does refinement beat a plain fine-tune, and with which settings?

Grids of small runs, scored alike.

    python -m study run study/grids/shapes.yaml --budget 2h    trains and scores what is missing
    python -m study report study/grids/shapes.yaml             writes its page from the stored results
    python -m study across study/grids/*.yaml                  writes the page over several worlds

A grid (study/grids/) names a world (study/worlds/): where the data come from, and which
pictures are right. docs/study/howto.md explains how to add an arm, a grid or a world.
"""
