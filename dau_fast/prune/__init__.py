"""Finding masks: by magnitude, at once (omp) or in rounds (imp), without data (synflow), by chance."""

from dau_fast.prune.imp import imp
from dau_fast.prune.masks import Masks
from dau_fast.prune.omp import omp
from dau_fast.prune.random import random
from dau_fast.prune.synflow import synflow

__all__ = ["Masks", "imp", "omp", "random", "synflow"]
