"""The description of a layer that every room of the package shares, and PEFT's prefix of names."""

from __future__ import annotations

from dataclasses import dataclass

PEFT_PREFIX = "base_model.model."
"""Begins the names of the base model's modules in a `PeftModel`, and in a saved adapter."""


@dataclass(frozen=True)
class LayerSpec:
    """A layer as an adapter sees it: its name, its sizes, and with which others it shares a rank.

    Attributes:
        name: in the base model, without any wrapper's prefix.
        in_features: the width of an input row, and so of A.
        out_features: the height of B.
        groups: of a convolution; ranks come in multiples of it, and B has the outputs of one group
            per column.
        rank_group: the layer of PEFT that this one is a part of, whose parts have one rank: the
            experts of one stacked weight, the projections of one attention. Empty for a layer that
            stands alone.
    """

    name: str
    in_features: int
    out_features: int
    groups: int = 1
    rank_group: str = ""

    @property
    def rank_key(self) -> str:
        """The name under which the layer gets its rank: of its rank group, or its own."""
        return self.rank_group or self.name

    @property
    def max_rank(self) -> int:
        """The rank of the layer's weight, at most."""
        return min(self.in_features, self.out_features)

    @property
    def parameters_per_rank(self) -> int:
        """Trainable parameters that one more rank costs: a row of A and a column of B."""
        return self.in_features + self.out_features // self.groups

    def described(self) -> str:
        """Return the sizes in words, for messages."""
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        whole = f" as a part of {self.rank_group}" if self.rank_group else ""
        return f"{self.in_features}→{self.out_features}{groups}{whole}"
