"""Solutions of tutorial 13."""

from ministeer.baselines import logits as decoding


def lma(p, q, s):
    return p - s * (q - p).clamp(min=0)


def both(wish, steer):
    stream = decoding.prompted(wish).steered(steer).streams[0]
    return stream.prefix, stream.steer[0].layer, stream.steer[0].coeff
