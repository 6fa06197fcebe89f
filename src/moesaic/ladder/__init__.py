"""Ladders: runs of growing size, the laws fitted to them, and what an idea is worth in compute."""
