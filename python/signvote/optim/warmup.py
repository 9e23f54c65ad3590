"""The warm-up that Theorem 3 of the paper on signSGD asks of Signum."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from numbers import Real


def signum_warmup_steps(beta: float) -> int:
    r"""The warm-up of Signum for momentum ``beta``: the constant :math:`C(\beta)` of Theorem 3 in `signSGD\:
    Compressed Optimisation for Non-Convex Problems`_.

    It is the smallest positive integer C with

    .. math::
        \frac{C}{2} \beta^C \le \frac{1}{1 - \beta^2} \frac{1}{C + 1}
        \quad \text{and} \quad \beta^{C + 1} \le \frac{1}{2}

    During the first C steps the momentum accumulates as ever, and the step is the sign of the gradient, as the
    momentum is still biased towards its start at 0.

    Args:
        beta (float): momentum constant, 0 <= β < 1

    Raises:
        TypeError: If ``beta`` is not a number.
        ValueError: If ``beta`` is out of range.

    .. note::
        The definition is taken at its word. For β from about 0.643 to 0.793 the smallest C, which is 1 or 2, comes
        before a few larger ones that break the first condition, although the proof asks it of all that follow.

    Example:
        >>> signvote.optim.signum_warmup_steps(0.9)
        54

    .. _signSGD\: Compressed Optimisation for Non-Convex Problems:
        https://arxiv.org/abs/1802.04434
    """
    if isinstance(beta, bool) or not isinstance(beta, Real):
        raise TypeError(f"signum_warmup_steps: beta is a {type(beta).__name__}, expected a float")
    if not 0 <= float(beta) < 1:
        raise ValueError(f"signum_warmup_steps: beta is {beta}, expected 0 <= beta < 1")
    if beta == 0:
        return 1
    with localcontext() as context:
        context.prec = 60  # C may be so large that floats do not tell it from its neighbours
        exact = Decimal(float(beta))
        log_beta, log_two, log_rest = exact.ln(), Decimal(2).ln(), (1 - exact * exact).ln()

        def excess(steps: int) -> Decimal:
            """The logarithm of the first condition's left side over its right."""
            return (Decimal(steps) * (steps + 1)).ln() - log_two + steps * log_beta + log_rest

        # The second condition holds from here on. C(C+1)β^C grows, then falls for ever, so that if the first
        # condition does not hold here either, it holds again from one place on, which bisection finds.
        least = max(1, math.ceil(-log_two / log_beta) - 1)
        if excess(least) <= 0:
            return least
        fails, holds = least, 2 * least
        while excess(holds) > 0:
            fails, holds = holds, 2 * holds
        while holds - fails > 1:
            middle = (fails + holds) // 2
            if excess(middle) > 0:
                fails = middle
            else:
                holds = middle
        return holds
