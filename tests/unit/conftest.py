"""Property tests: few examples at each run, so that the suite stays quick; `--hypothesis-profile=thorough` for a long look."""

from __future__ import annotations

from hypothesis import settings

# No deadline for single examples: a busy machine is no bug.
settings.register_profile("quick", max_examples=40, deadline=None)
settings.register_profile("thorough", max_examples=3_000, deadline=None)
settings.load_profile("quick")
