"""Plain training on labels: the baseline that every claim is measured against.

    L = -(1/B) sum_b sum_c t_bc log softmax(z_b)_c,   t = (1 - s) onehot(y) + s / C

with the label smoothing s = 0 by default (Szegedy et al. 2016, section 7).
"""

from __future__ import annotations

from limbeck.train import CrossEntropy


class Supervised(CrossEntropy):
    """The objective that systems of several stages fine-tune by, as a system of its own."""
