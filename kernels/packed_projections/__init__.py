"""Linear layers over one input as one matrix product.

- :class:`OneProduct` joins the weights of some layers, plain or quantized alike, and runs them as
  one product; the layers keep slices of the joined weights.
- :class:`ProductStack` does so for every layer of a network, with a product over all of them for
  an input that they share.
- :func:`decide` says which groups of layers it is done for. Implementations of
  ``packed-projections`` and ``packed-drafter`` are plans (modules `target` and `drafter`):
  ``packed`` takes every kind of group, the others the kind of their name, ``measure`` what is
  faster here.
"""

from .plan import PAYS, PLANS, Decision, Groups, Plan, decide, pays, ratios
from .product import OneProduct, ProductStack, why_not

__all__ = [
    "PAYS",
    "PLANS",
    "Decision",
    "Groups",
    "OneProduct",
    "Plan",
    "ProductStack",
    "decide",
    "pays",
    "ratios",
    "why_not",
]
