"""Solutions of tutorial 09."""

from itertools import product


def on_target(matrix):
    diagonal = matrix.diagonal()
    rest = (matrix.sum() - diagonal.sum()) / (matrix.numel() - len(diagonal))
    return (diagonal.mean() - rest).item()


def sign_test(differences):
    seen = abs(sum(differences))
    sums = []
    for signs in product((1, -1), repeat=len(differences)):
        sums.append(abs(sum(sign * d for sign, d in zip(signs, differences, strict=True))))
    # Rounding must not decide between equal sums.
    return sum(total >= seen - 1e-9 for total in sums) / len(sums)
