"""Studies: one question, arms that differ in few keys, seeds, intervals, and a verdict made from the rows alone."""
