"""Published methods under the names of their papers, each a short composition of objectives, measures and weights."""

from falign.methods.context import ContextDistillation, PrivilegedDistillation
from falign.methods.core import DPHRL, FDPG, FDPO, SALSA, SALSARLOO, TDPO
from falign.methods.distillation import ADPA, DCKD, KD, KDRL, OPD, PSKD, ExOPD
from falign.methods.groups import OREAL, BestOfN, DisCO, SuperHF
from falign.methods.measures import EMO, LSKD, NKD, PLD, STARCKD, SinKD
from falign.methods.scheduled import SAFE, TCOD, CorrelatedProxies, ProRL
from falign.methods.unpaired import FSFT, HDPO, KTO, RPO, SequenceMatch
from falign.methods.weighted import ACE, APO, BDKD, OPADPO, PACED, RLAD, TSDKD, AdaSPEC, SparsePO
from falign.methods.win_rates import InfAlign, NashMirrorProx

__all__ = [
    "ACE",
    "ADPA",
    "APO",
    "BDKD",
    "DCKD",
    "DPHRL",
    "EMO",
    "FDPG",
    "FDPO",
    "FSFT",
    "HDPO",
    "KD",
    "KDRL",
    "KTO",
    "LSKD",
    "NKD",
    "OPADPO",
    "OPD",
    "OREAL",
    "PACED",
    "PLD",
    "PSKD",
    "RLAD",
    "RPO",
    "SAFE",
    "SALSA",
    "SALSARLOO",
    "STARCKD",
    "TCOD",
    "TDPO",
    "TSDKD",
    "AdaSPEC",
    "BestOfN",
    "ContextDistillation",
    "CorrelatedProxies",
    "DisCO",
    "ExOPD",
    "InfAlign",
    "NashMirrorProx",
    "PrivilegedDistillation",
    "ProRL",
    "SequenceMatch",
    "SinKD",
    "SparsePO",
    "SuperHF",
]
