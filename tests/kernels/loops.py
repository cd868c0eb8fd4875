"""The family for one row, as loops over Python floats: what the reference is held against."""

import math

INF, NAN = math.inf, math.nan


def loop_capped(row, cap):
    return [cap * math.tanh(x / cap) for x in row] if cap else list(row)


def loop_edited(row, tokens, rule):
    result = list(row)
    for token in tokens:
        if token < len(row):
            if rule.edit == "add":
                result[token] += rule.edit_value
            else:
                result[token] = -INF if rule.edit == "ban" else sum(row) / len(row)
    return result


def loop_target(teachers, rule):
    """Target logits of one row of edited teachers."""
    base, *others = teachers
    target = []
    for v, b in enumerate(base):
        if b == -INF:
            target.append(-INF)
            continue
        if rule.combination == "identity":
            t = b
        elif rule.combination == "whp":
            over = others[0][v] - b
            t = b - rule.weight * (over if over > 0 or math.isnan(over) else 0.0)
        else:
            t = b + rule.weight * (others[0][v] - others[1][v] if len(others) == 2 else others[0][v])
        highest = max((x for x in base if not math.isnan(x)), default=NAN)
        if rule.relative_top and b < highest and not math.exp(b - highest) >= rule.relative_top:
            t = b if rule.outside == "keep" else -INF
        target.append(t)
    return target


def loop_argmax(row):
    best = 0
    for v, x in enumerate(row):
        if x > row[best]:
            best = v
    return best


def loop_unusable(teachers, target):
    return any(math.isnan(x) for row in [*teachers, target] for x in row) or not math.isfinite(max(target))


def loop_log_softmax(row):
    if any(math.isnan(x) for x in row) or not math.isfinite(max(row)):
        return [NAN] * len(row)
    highest = max(row)
    log_sum = math.log(sum(math.exp(x - highest) for x in row))
    return [x - highest - log_sum for x in row]


def loop_kl(log_p, log_q):
    return sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q) if not a == -INF)


def loop_loss(student, target, label, rule):
    if rule.divergence in ("label", "hard"):
        return -loop_log_softmax(student)[loop_argmax(target) if rule.divergence == "hard" else label]
    log_s, log_t = (loop_log_softmax([x / rule.temperature for x in row]) for row in (student, target))
    if rule.divergence == "cross_entropy":
        return -sum(math.exp(a) * b for a, b in zip(log_t, log_s) if not a == -INF)
    if rule.divergence == "forward_kl":
        return loop_kl(log_t, log_s)
    if rule.divergence == "reverse_kl":
        return loop_kl(log_s, log_t)
    p = [rule.beta * math.exp(a) + (1 - rule.beta) * math.exp(b) for a, b in zip(log_t, log_s)]
    log_m = [math.log(x) if x else (-INF if x == 0 else x) for x in p]
    return rule.beta * loop_kl(log_t, log_m) + (1 - rule.beta) * loop_kl(log_s, log_m)
