"""Solutions of tutorial 13."""

from ministeer.baselines import logits as baselines


def lma(p, q, s):
    return p - s * (q - p).clamp(min=0)


def both(request, steer):
    first = baselines.prompted(request).steered(steer).branches[0]
    return first.prefix, first.steer[0].layer, first.steer[0].coeff
