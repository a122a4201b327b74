"""Published methods under the names of their papers, each a short composition of objectives, measures and weights."""

from falign.methods.core import DPHRL, FDPG, FDPO, SALSA, SALSARLOO, TDPO
from falign.methods.measures import EMO, LSKD, NKD, PLD, STARCKD, SinKD
from falign.methods.unpaired import KTO

__all__ = [
    "DPHRL",
    "EMO",
    "FDPG",
    "FDPO",
    "KTO",
    "LSKD",
    "NKD",
    "PLD",
    "SALSA",
    "SALSARLOO",
    "STARCKD",
    "TDPO",
    "SinKD",
]
