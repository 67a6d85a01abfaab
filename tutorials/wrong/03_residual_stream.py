"""Wrong answers of tutorial 03, each called EXERCISE_MISTAKE; its check refuses each."""


def added_difference_of_norms(resid, l, t):
    return (resid[l + 1][0, t].norm() - resid[l][0, t].norm()).item()


def added_whole_stream(resid, l, t):
    return resid[l + 1][0, t].norm().item()


def added_all_positions(resid, l, t):
    return (resid[l + 1] - resid[l])[0].norm().item()


def added_block_before(resid, l, t):
    return (resid[l] - resid[l - 1])[0, t].norm().item()


def decided_first_time(model, resid):
    tops = [model.unembed(x)[0, -1].argmax().item() for x in resid]
    return tops.index(tops[-1])


def decided_last_other(model, resid):
    tops = [model.unembed(x)[0, -1].argmax().item() for x in resid]
    return max([l for l, top in enumerate(tops) if top != tops[-1]], default=0)


def decided_first_position(model, resid):
    tops = [model.unembed(x)[0, 0].argmax().item() for x in resid]
    return max([l + 1 for l, top in enumerate(tops) if top != tops[-1]], default=0)


def decided_how_many_agree(model, resid):
    tops = [model.unembed(x)[0, -1].argmax().item() for x in resid]
    return len(tops) - tops.count(tops[-1])
