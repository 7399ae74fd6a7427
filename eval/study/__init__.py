"""Does refinement beat a plain fine-tune, and with which settings? Grids of small runs, scored alike.

    python -m eval.study run eval/study/grids/shapes.yaml --budget 2h      trains and scores what is missing
    python -m eval.study report eval/study/grids/shapes.yaml            writes its page from the stored results alone
    python -m eval.study across eval/study/grids/*.yaml                 and one that sets worlds beside each other

A grid (eval/study/grids/) names a world (eval/study/worlds/): where its data come from and what is right in a picture.
"""
