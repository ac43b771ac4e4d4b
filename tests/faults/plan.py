"""How long the fault tests go on: the one place that reads it from the environment.

Without any variables: the small edition that CI runs. `make faults` sets the numbers of the issue.
"""

from __future__ import annotations

import functools
import os
import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """`rounds`: each has every kind of disturbance once. `outage_s`: how long RabbitMQ is away. `seed`: of order and moments.
    `bucket_outage_s`: how long the object store is away.

    `minutes`: after so many no further round is begun.
    """

    rounds: int
    minutes: float
    outage_s: float
    seed: int
    bucket_outage_s: float


@functools.cache
def plan() -> Plan:
    return Plan(
        rounds=int(os.environ.get("ROUNDS") or 5),
        minutes=float(os.environ.get("MINUTES") or "inf"),
        outage_s=float(os.environ.get("OUTAGE_S") or 60),
        bucket_outage_s=float(os.environ.get("BUCKET_OUTAGE_S") or 8),
        seed=int(os.environ.get("SEED") or random.SystemRandom().randrange(1_000_000)),
    )
