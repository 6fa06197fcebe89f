"""What a model or a tree of runs is worth: scores, router health, plots, reports."""
