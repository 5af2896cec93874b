"""Pages: the report of a run and the leaderboard's folder. Plain HTML with SVG, one file each, no network.

Nothing here imports torch, and nothing of it is imported before a page is written.
"""
