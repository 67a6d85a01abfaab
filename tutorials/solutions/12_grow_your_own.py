"""Solutions of tutorial 12."""


def n_weights(config):
    d, m = config.d_model, config.d_mlp
    embedding = (config.n_vocab + config.n_ctx) * d
    norm = 2 * d
    attention = (d * 3 * d + 3 * d) + (d * d + d)
    mlp = (d * m + m) + (m * d + d)
    return embedding + config.n_layer * (2 * norm + attention + mlp) + norm


def stronger_helps(hits, vectors, model):
    best = max(hits(model, vectors(model, 3, coeff)) for coeff in (2, 4))
    return best > hits(model, vectors(model, 1))
