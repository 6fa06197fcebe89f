"""From an idea to a verdict: one comparison against a baseline, made fair and run over several seeds."""
