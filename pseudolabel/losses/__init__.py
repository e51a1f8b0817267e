"""Losses over cached soft labels.

    L = (1−α)·CE(s, y) + α·T²·KL(softmax(z/T) ‖ softmax(s/T))

with student logits s, teacher logits z, labels y. CE is averaged over the labeled rows, KL summed over classes and
averaged over the rows with soft labels, each row times its weight. T² keeps the soft gradient's size when T changes
(Hinton, Vinyals, Dean 2015, arXiv:1503.02531, §2). Everything is computed in float32 or wider, whatever the autocast.

In the place of T²·KL stands whichever loss a spec names (docs/losses.md has the table):

    divergences.py   kd, jsd, wttm, mse, hard: row by row, from probabilities or logits
    decoupled.py     dkd, nkd: the target class apart from the others
    relations.py     dist: correlations in a row and over a batch
    choice.py        specs such as dkd?beta=4, and what each loss needs of an encoding
    mixture.py       the combined loss of a batch
"""

from pseudolabel.losses.choice import LOSSES, SoftLabels, check_loss, parse_loss
from pseudolabel.losses.divergences import hard, kd
from pseudolabel.losses.full import FullTargets, kd_loss
from pseudolabel.losses.mixture import NO_LABEL, LabelLoss, Losses, Mixture, check

__all__ = [
    "LOSSES",
    "NO_LABEL",
    "FullTargets",
    "LabelLoss",
    "Losses",
    "Mixture",
    "SoftLabels",
    "check",
    "check_loss",
    "hard",
    "kd",
    "kd_loss",
    "parse_loss",
]
