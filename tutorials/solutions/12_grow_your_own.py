"""Solutions of tutorial 12."""


def n_weights(config):
    d, m = config.d_model, config.d_mlp
    block = 2 * 2 * d + (d * 3 * d + 3 * d) + (d * d + d) + (d * m + m) + (m * d + d)
    return (config.n_vocab + config.n_ctx) * d + config.n_layer * block + 2 * d


def stronger_helps(hits, vectors, model):
    best = max(hits(model, vectors(model, 5, coeff)) for coeff in (2, 4))
    return best > hits(model, vectors(model, 1))
