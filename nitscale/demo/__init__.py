"""`nitscale demo`: the whole main job at the size of a laptop, from pictures to a judged set of samples."""
