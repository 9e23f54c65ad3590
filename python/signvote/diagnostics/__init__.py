"""Measurements that tell whether a network suits sign methods: density, noise, and the shape of the noise.

Equations and sections are those of Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems" (ICML
2018).

Each line uses those above it:

- ``gradients`` (what is taken for one), ``densities``, ``moments`` (of each coordinate, in one pass);
- ``summary`` (of the moments), ``gradient_statistics`` (moments over micro-batches);
- ``drawing``.
"""

from signvote.diagnostics.densities import density
from signvote.diagnostics.drawing import VoteRecord, draw
from signvote.diagnostics.gradient_statistics import GradientStatistics
from signvote.diagnostics.moments import BIMODAL
from signvote.diagnostics.summary import GradientSummary

__all__ = ["BIMODAL", "GradientStatistics", "GradientSummary", "VoteRecord", "density", "draw"]
