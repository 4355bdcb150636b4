"""What `convert` was told, checked once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ... import validation
from ...distributed import resolve_process_group
from ...functional_detection import NORMALIZER_SCOPES

OP = "convert"
DIVISORS = ("torchvision", "paper")


@dataclass(frozen=True)
class Settings:
    """The losses of a converted model; the attribute `iou_balanced` of the modules that compute them.

    Attributes are the arguments of `convert`. beta None stands for the model's own box loss.

    Raises:
        TypeError, ValueError: an argument of another type or out of range.
    """

    eta: float = 1.5
    lambda_: float = 1.5
    w_loc: float = 1.0
    beta: float | None = None
    divisor: str = "torchvision"
    normalizer_scope: str = "batch"
    classification: bool = True
    localization: bool = True
    backend: str | None = None
    alpha: float | None = 0.25
    gamma: float = 2.0
    eps: float = 0.0
    normalize_loc: bool = False
    cls_weight: float = 1.0
    process_group: Any = None

    def __post_init__(self) -> None:
        for name in ("eta", "lambda_", "w_loc", "gamma", "eps", "cls_weight"):
            validation.number(OP, name, getattr(self, name))
        if self.beta is not None:
            validation.number(OP, "beta", self.beta)
        if self.alpha is not None:
            validation.number(OP, "alpha", self.alpha, high=1.0)
        for name in ("classification", "localization", "normalize_loc"):
            validation.flag(OP, name, getattr(self, name))
        validation.choice(OP, "divisor", self.divisor, DIVISORS)
        validation.choice(OP, "normalizer_scope", self.normalizer_scope, NORMALIZER_SCOPES)
        if self.backend is not None:
            validation.choice(OP, "backend", self.backend, ("cpu", "cuda", "triton", "reference"))

    def with_beta(self, own: float) -> Settings:
        """The same with the model's own smooth L1 threshold where none was given."""
        return replace(self, beta=own) if self.beta is None else self

    def group(self, op: str) -> Any:
        """The process group, resolved now: "world" may have been given before the group existed."""
        return resolve_process_group(op, self.process_group)

    @property
    def classification_exponent(self) -> float:
        """eta, or 0 with classification=False: the plain loss."""
        return self.eta if self.classification else 0.0

    def localization_keywords(self) -> dict[str, Any]:
        """lambda_, w_loc, beta and the form of the weight; the plain smooth L1 with localization=False."""
        if not self.localization:
            return {"lambda_": 0.0, "w_loc": 1.0, "beta": self.beta}
        return {"lambda_": self.lambda_, "w_loc": self.w_loc, "beta": self.beta}

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of `iou_balanced_detection_loss`, without the divisor."""
        return {
            **self.localization_keywords(),
            "eta": self.classification_exponent,
            "alpha": self.alpha,
            "gamma": self.gamma,
            "eps": self.eps,
            "cls_weight": self.cls_weight,
            "normalize_loc": self.normalize_loc and self.localization,
            "normalizer_scope": self.normalizer_scope,
            "process_group": self.process_group,
            "backend": self.backend,
        }
