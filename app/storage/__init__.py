"""Run folders kept at a URL too: the place, what of a folder is kept there and in which order, and who may write."""
