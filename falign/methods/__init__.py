"""Published methods under the names of their papers, each a short composition of objectives, measures and weights."""

from falign.methods.core import DPHRL, FDPG, FDPO, SALSA, SALSARLOO, TDPO

__all__ = ["DPHRL", "FDPG", "FDPO", "SALSA", "SALSARLOO", "TDPO"]
