"""The bill beforehand: samples, hours, bytes and rejects of an annotation, from a probe of its shards.

    plan("corpus/unlabeled", "checkpoint:runs/teacher")

Samples are counted or estimated (`census.py`); annotate's own pipeline runs on a part of them in a temporary store
(`probe.py`, timed by `stopwatch.py`), which shows its speed, its rejects and its logits; those are written in every
encoding (`price.py`). `bill.py` adds up. Nothing is written but temporary files. What depends on no clock is the same
at every call.
"""

from pseudolabel.plan.bill import GOOD_KL, EncodingPlan, Plan, plan, recommend

__all__ = ["GOOD_KL", "EncodingPlan", "Plan", "plan", "recommend"]
