"""When a fusion pays: rules of a shape that kernels, backends and the accounts of bytes share."""

from .problem import ConvProblem

#: Each N tile of dgrad makes its prologue's operand again, from L2. By arithmetic, up to 512 channels (four or eight N tiles) that costs
#: less than a pass that writes it; with 2,048, of 512 at the other side, L2 would take longer than the products.
MOST_CHANNELS = 512


def pays_to_apply_norm(problem: ConvProblem) -> bool:
    """Whether dgrad makes dy of dz and y on load: where each pixel is read by one tap, and by few N tiles."""
    return problem.pointwise and problem.c <= MOST_CHANNELS
