"""Wrong answers of tutorial 12, each called EXERCISE_MISTAKE; its check refuses each."""


def n_weights_without_biases(config):
    d, m = config.d_model, config.d_mlp
    return (config.n_vocab + config.n_ctx) * d + config.n_layer * (4 * d + 4 * d * d + 2 * d * m) + 2 * d


def n_weights_mlp_of_4_d(config):
    d = config.d_model
    return (config.n_vocab + config.n_ctx) * d + config.n_layer * (12 * d * d + 13 * d) + 2 * d


def n_weights_head_again(config):
    d, m = config.d_model, config.d_mlp
    block = 4 * d + (4 * d * d + 4 * d) + (2 * d * m + m + d)
    return (2 * config.n_vocab + config.n_ctx) * d + config.n_layer * block + 2 * d


def n_weights_no_positions(config):
    d, m = config.d_model, config.d_mlp
    block = 4 * d + (4 * d * d + 4 * d) + (2 * d * m + m + d)
    return config.n_vocab * d + config.n_layer * block + 2 * d


def stronger_helps_never(hits, vectors, model):
    return False


def stronger_helps_coefficient_4_only(hits, vectors, model):
    return hits(model, vectors(model, 3, 4)) > hits(model, vectors(model, 1))


def stronger_helps_coefficient_2_only(hits, vectors, model):
    return hits(model, vectors(model, 3, 2)) > hits(model, vectors(model, 1))


def stronger_helps_or_as_good(hits, vectors, model):
    return max(hits(model, vectors(model, 3, coeff)) for coeff in (2, 4)) >= hits(model, vectors(model, 1))
