"""Published methods under the names of their papers, each a short composition of objectives, measures and weights."""

from falign.methods.core import DPHRL, FDPG, FDPO, SALSA, SALSARLOO, TDPO
from falign.methods.measures import EMO, LSKD, NKD, PLD, STARCKD, SinKD
from falign.methods.unpaired import KTO
from falign.methods.weighted import ACE, APO, BDKD, OPADPO, PACED, RLAD, TSDKD, AdaSPEC, SparsePO
from falign.methods.win_rates import InfAlign, NashMirrorProx

__all__ = [
    "ACE",
    "APO",
    "BDKD",
    "DPHRL",
    "EMO",
    "FDPG",
    "FDPO",
    "KTO",
    "LSKD",
    "NKD",
    "OPADPO",
    "PACED",
    "PLD",
    "RLAD",
    "SALSA",
    "SALSARLOO",
    "STARCKD",
    "TDPO",
    "TSDKD",
    "AdaSPEC",
    "InfAlign",
    "NashMirrorProx",
    "SinKD",
    "SparsePO",
]
